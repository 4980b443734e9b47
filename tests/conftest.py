"""What holds for every test: shapes are checked while it runs, randomness is seeded, warnings are errors."""

import jaxtyping
import pytest
import torch

from tests import typechecker
from tests.ranks import Ranks, processes

jaxtyping.install_import_hook("gatewright", f"{typechecker.__name__}.check")  # Before anything imports gatewright.
torch.set_num_threads(1)  # What is this small gains nothing from a second thread, and loses much on a busy machine.


def pytest_collection_modifyitems(items):
    """Begin with what takes longest and starts processes: no worker ends alone, and few start the same processes."""
    items.sort(key=lambda item: [item.get_closest_marker(name) is None for name in ("slow", "distributed")])


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def unchecked():
    """Let a test pass what annotations forbid, to read what a user without the run-time checks is told."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def poisoned():
    """Have torch fill with NaN all memory that it would leave uninitialised."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="session")
def unhooked():
    """Start a function in another process, without the import hook, whose wrappers torch.compile cannot trace."""
    with processes(1) as pool:
        yield pool.submit
        pool.shutdown(cancel_futures=True)


@pytest.fixture(scope="session")
def run_unhooked(unhooked):
    """Run a function in such a process, and wait for what it returns."""
    return lambda function, *args: unhooked(function, *args).result()


@pytest.fixture(scope="session")
def ranks(tmp_path_factory):
    """Run functions on several processes: ``ranks(world, function, *args)``."""
    groups = Ranks(tmp_path_factory.mktemp("ranks"))
    yield groups.run
    groups.close()
