"""Runs of several real processes, which are killed, stopped and started again as a machine or a person would."""

import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.train.runs import environment, logged, wait_until

FLAGS = (
    *("--processes", "2", "--parallel.ep-size", "2", "--checkpoint-every-steps", "5"),
    *("--tracking.no-enabled", "--tracking.log-interval", "1", "--no-report"),
)
GRACE = 1.5  # seconds after a kill in which the other process may still log its step
needs_proc = pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds processes in Linux's /proc")


class Launched:
    """``gatewright train digits`` on two processes."""

    def __init__(self, output, *flags, folder=None):
        folder = folder or output.parent
        self.output, self.words = output, folder / f"{output.name}-errors"
        with self.words.open("a") as errors:  # A pipe that nobody reads would fill up.
            self.process = subprocess.Popen(
                [sys.executable, "-m", "gatewright", "train", "digits", "--output", output, *FLAGS, *map(str, flags)],
                cwd=folder,
                env=environment(folder),
                stdout=subprocess.DEVNULL,
                stderr=errors,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for worker in self.workers().values():
            os.kill(worker, signal.SIGKILL)
        self.process.kill()
        self.process.wait()

    def errors(self):
        return self.words.read_text()

    def steps(self):
        """Steps in the order in which they were made, with the time at which they were logged."""
        lines = [line for line in logged(self.output) if "train/task_loss" in line["values"]]
        return [(line["step"], line["time"]) for line in lines]

    def workers(self):
        """Numbers of the run's processes by rank."""
        found = {}
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        except OSError:
            return found
        for child in children:
            try:
                variables = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            except OSError:
                continue
            found |= {int(word.removeprefix(b"RANK=")): int(child) for word in variables if word.startswith(b"RANK=")}
        return found

    def wait_for(self, condition):
        wait_until(lambda: condition() or self.process.poll() is not None)
        assert self.process.poll() is None, self.errors()

    def wait_for_new_worker(self, rank, dead=()):
        self.wait_for(lambda: self.workers().get(rank) not in {None, *dead})

    def wait_for_step(self, step, since=0.0):
        self.wait_for(lambda: any(made >= step and at > since + GRACE for made, at in self.steps()))

    def kill(self, rank, moment, dead):
        """Kill one process; the others follow, and all are added to the dead."""
        workers, began = self.workers(), time.time_ns()
        os.kill(workers[rank], signal.SIGKILL)
        dead |= {*workers.values()}
        kill = Kill(moment, rank, time.time())
        self.wait_for(lambda: not dead & {*self.workers().values()})
        kill.half_written = any(begun > began - 1e9 for begun in half_written(self.output / "checkpoints"))
        return kill

    def finish(self, seconds=300):
        return self.process.wait(seconds)


@dataclass
class Kill:
    """One SIGKILL: what the run was doing, who died and when."""

    moment: str
    rank: int
    at: float
    step: int = 0
    lost: int = 0
    half_written: bool = False
    """Whether it left a part of a checkpoint behind."""


def kill_at_random(run, moments, last_step, seed):
    """Kill a random process at each moment, the training ones at random steps; return what was done."""
    rng = random.Random(seed)
    latest = last_step - max(10, last_step // 5)  # for a run that ends meanwhile cannot be killed
    targets = iter(sorted(rng.sample(range(6, latest), len(moments))))
    kills, dead = [], set()
    for moment in moments:
        rank, target = rng.randrange(2), next(targets)
        run.wait_for_new_worker(rank, dead)
        if moment == "starting":
            wait_for_moment(rng.uniform(0, 4))
        else:
            run.wait_for_step(target, since=kills[-1].at if kills else 0.0)
        if moment == "training":
            wait_for_moment(rng.uniform(0, 0.1))
        if moment == "writing":
            wait_for_writing(run.output / "checkpoints")
        kills.append(run.kill(rank, moment, dead))
    return kills


def wait_for_moment(seconds):
    moment = time.monotonic() + seconds
    wait_until(lambda: time.monotonic() >= moment)


def wait_for_writing(folder, seconds=60.0):
    """Return as soon as a checkpoint is being written: without a pause, for that takes milliseconds."""
    began, deadline = time.time_ns(), time.monotonic() + seconds
    while not any(begun > began for begun in half_written(folder)):
        assert time.monotonic() < deadline, "no checkpoint was written"


def half_written(folder):
    """When each file of a checkpoint that is not complete was written to last; some may have gone meanwhile."""
    for path in folder.glob("*.partial"):
        try:
            yield path.stat().st_mtime_ns
        except FileNotFoundError:
            continue


def count_losses(kills, steps):
    """Fill in the last step before each kill, and how many were made again after it."""
    for kill, before in zip(kills, [0.0, *(kill.at + GRACE for kill in kills)], strict=False):
        made = [step for step, at in steps if before < at < kill.at + GRACE]
        after = [step for step, at in steps if at >= kill.at + GRACE]
        kill.step = max((step for step, at in steps if at < kill.at + GRACE), default=0)
        kill.lost = made[-1] - after[0] + 1 if made else 0


def table(kills, differing):
    rows = [
        f"| {number} | {kill.moment}{', a part of it left' if kill.half_written else ''} | {kill.rank} | {kill.step} "
        f"| {kill.lost} |"
        for number, kill in enumerate(kills, 1)
    ]
    head = ["| kill | while | process | after step | steps made again |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*head, *rows, f"Tensors and numbers of the final state that differ: {len(differing)}."])
