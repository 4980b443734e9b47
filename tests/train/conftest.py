import pytest

from gatewright.train import train
from tests.train.runs import digits_config


@pytest.fixture(autouse=True)
def _own_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GATEWRIGHT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.fixture
def folder(tmp_path):
    """Where checkpoints go; not there yet."""
    return tmp_path / "checkpoints"


@pytest.fixture(scope="package")
def finished(tmp_path_factory):
    """A finished run of the digits: its config, its folder and its result."""
    config = digits_config(tmp_path_factory.mktemp("finished") / "run", epochs=2, log_interval=5, optim={"lr": 5e-3})
    result, output = train(config)
    return config, output, result
