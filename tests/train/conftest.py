import tempfile
from pathlib import Path

import pytest

from gatewright.train import train
from tests.train.mlflow_server import Server
from tests.train.runs import digits_config, one_thread  # noqa: F401 the fixture works by being here


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
def finished(one_thread, tmp_path_factory):  # noqa: F811
    """A finished run of the digits: its config, its folder and its result."""
    config = digits_config(tmp_path_factory.mktemp("finished") / "run", epochs=2, log_interval=5, optim={"lr": 5e-3})
    result, output = train(config)
    return config, output, result


@pytest.fixture(scope="session")
def the_server():
    """An MLflow server that may not answer yet."""
    # In memory where there is such a folder: creating the store waits five seconds for a slow disk.
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        server = Server(Path(folder))
        server.launch()
        yield server
        server.kill()


@pytest.fixture
def server(the_server):
    the_server.start()
    return the_server


@pytest.fixture
def client(server):
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=server.uri)
