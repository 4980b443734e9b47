"""A run on two hosts, one of which is cut off: both say so within the timeout, and the run goes on when it is back."""

import pytest

from gatewright.train.checkpoint.format import newest_checkpoint
from tests.train.hosts import Hosts, why_not
from tests.train.runs import steps_of, wait_until

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

TIMEOUT = 20
FLAGS = ("--epochs", 2, "--parallel.ep-size", 2, "--parallel.timeout", TIMEOUT, "--checkpoint-every-steps", 5)
LOST = "lost the others after step"
QUIET = ("--tracking.no-enabled", "--tracking.log-interval", 1, "--no-report")


@pytest.fixture
def hosts():
    if (reason := why_not()) is not None:
        pytest.skip(reason)
    with Hosts() as joined:
        yield joined


def start_both(hosts, folder, port, *words):
    return [hosts.start(host, folder, port, "train", "digits", "--output", "run", *words) for host in range(2)]


def test_a_host_that_is_cut_off_is_reported_on_both_sides_and_the_run_goes_on_when_it_is_back(hosts, tmp_path):
    output = tmp_path / "run"
    (first, said_first), (second, said_second) = start_both(hosts, tmp_path, 29400, *FLAGS, *QUIET)
    wait_until(lambda: max(steps_of(output), default=0) >= 12 or None not in (first.poll(), second.poll()))
    assert first.poll() is None, said_first.read_text()
    hosts.cut()
    wait_until(lambda: all(path.read_text().count(LOST) == 2 for path in (said_first, said_second)), 3 * TIMEOUT)
    assert first.wait(60) != 0
    hosts.clear(1)  # Without its peer's store torchrun waits there for minutes, when its processes have long ended.
    assert second.wait(60) != 0
    for path, own, others in ((said_first, (0, 1), (2, 3)), (said_second, (2, 3), (0, 1))):
        lost = [line for line in path.read_text().splitlines() if LOST in line]
        assert sorted(line.split()[2] for line in lost) == [str(rank) for rank in own]
        assert all(any(f"Process {rank} was last heard of" in line for rank in others) for line in lost)

    made = steps_of(output)
    assert made == list(range(1, len(made) + 1))
    saved = int(newest_checkpoint(output / "checkpoints").stem.removeprefix("step-"))
    assert len(made) - saved < 5
    hosts.mend()
    resumed = start_both(hosts, tmp_path, 29401, "--resume", "--no-report")
    assert [process.wait(300) for process, _ in resumed] == [0, 0], resumed[0][1].read_text()
    assert steps_of(output) == [*made, *range(saved + 1, 43)]
    assert (output / "result.json").is_file()
