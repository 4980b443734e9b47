"""The engines that can train a run, each imported only when a run asks for it."""

from collections.abc import Mapping
from pkgutil import resolve_name

from gatewright.train.config import EngineName
from gatewright.train.step import TorchEngine

ENGINES: Mapping[EngineName, str] = {
    "torch": "gatewright.train.step:TorchEngine",
    "deepspeed": "gatewright.integrations.deepspeed.engine:DeepSpeedEngine",
}
"""The place of each engine's class, as ``"module:Class"``."""


def engine_class(name: EngineName) -> type[TorchEngine]:
    """Import the class of an engine."""
    engine: type[TorchEngine] = resolve_name(ENGINES[name])
    return engine
