from typing import get_args

from gatewright.train.config import EngineName
from gatewright.train.engines import ENGINES, engine_class
from gatewright.train.step import TorchEngine


def test_every_engine_that_a_config_can_name_is_there():
    assert set(ENGINES) == set(get_args(EngineName))
    assert all(issubclass(engine_class(name), TorchEngine) for name in ENGINES)
