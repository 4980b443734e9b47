"""A process that hangs is named; a disk that is full or damaged is said once, and the older checkpoint serves."""

import os
import signal
import subprocess

import pytest

from gatewright.train.checkpoint.format import load_checkpoint, newest_checkpoint
from tests.train.launched import Launched, needs_proc
from tests.train.runs import wait_until

pytestmark = [pytest.mark.distributed, needs_proc]


@pytest.mark.parametrize("rank", [1, pytest.param(0, marks=pytest.mark.slow)])
def test_a_process_that_hangs_is_named_with_its_last_step(tmp_path, rank):
    flags = ("--epochs", 2, "--parallel.timeout", 15, "--parallel.max-restarts", 0)
    with Launched(tmp_path / "run", *flags) as run:
        run.wait_for_step(12)
        hung = run.workers()[rank]
        os.kill(hung, signal.SIGSTOP)
        last = run.steps()[-1][0]
        wait_until(lambda: "lost the others" in run.errors())
        os.kill(hung, signal.SIGCONT)  # to die of the launcher's SIGTERM: it gives a stopped one 30 s
        assert run.finish() == 2
    words = run.errors()
    (said,) = [line for line in words.splitlines() if line.startswith(f"error: Process {1 - rank} lost the others")]
    assert f"after step {last}" in said or f"after step {last + 1}" in said
    assert f"Process {rank} was last heard of" in said
    assert f"error: Process {1 - rank} (pid " in words
    assert "ended with exit status 3, after 0 restarts (--parallel.max-restarts)" in words
    if rank == 1:  # The first process keeps their store: when it hangs, the others have what they read before.
        assert f"s ago, after step {last}" in said or f"s ago, after step {last + 1}" in said
        assert "The run gives up after 15 s." in words


@pytest.fixture
def disk(tmp_path):
    """A real disk of 2.4 MB, on which a run of digits can save twice, each time 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2400k", "tmpfs", place], capture_output=True, text=True)
    if mount.returncode:
        pytest.skip(f"mounting a small disk needs rights that this user has not: {mount.stderr.strip()}")
    yield place
    subprocess.run(["umount", place], check=True)


def test_a_full_disk_then_a_damaged_checkpoint(disk):
    """Two processes, one sentence, no start again; then the run goes on, by the older of two checkpoints."""
    with Launched(disk / "run", "--epochs", 1) as run:
        assert run.finish() == 2
    words = [line for line in run.errors().splitlines() if line.startswith("error:")]
    assert len(words) == 2, run.errors()
    assert sum("step 15 could not be written" in word and "No space left on device" in word for word in words) == 1
    assert sum("Another process could not write the checkpoint" in word for word in words) == 1
    assert "start again" not in run.errors()
    assert "(exitcode" not in run.errors()  # torch's own line of what has been said
    good = newest_checkpoint(disk / "run" / "checkpoints")
    assert any(f"{good} is intact" in word for word in words)
    assert load_checkpoint(good)["position"]["step"] == 10

    subprocess.run(["mount", "-o", "remount,size=20m", disk], check=True)
    content = good.read_bytes()
    good.unlink()
    good.write_bytes(content[:-100])
    with Launched(disk / "run", "--resume", "--epochs", 1) as resumed:
        assert resumed.finish() == 0, resumed.errors()
    assert f"{good} is damaged, and is now {good.name}.damaged; going on from step 5." in resumed.errors()
    assert [step for step, _ in resumed.steps()] == [*range(1, 16), *range(6, 22)]
