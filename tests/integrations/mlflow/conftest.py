import tempfile
from pathlib import Path

import pytest

from tests.integrations.mlflow.server import Server


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
