"""Every process says that it lives and how far it is, so that one which hangs or is cut off can be named."""

import atexit
import contextlib
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch.distributed as dist

from gatewright.train.strategies.ddp import DDPStrategy

ROOT = str(Path(__file__).parent.parent)
LEFT = "left"
SHOWN = 4
PAUSE = 1.0
"""Seconds that a process waits that lost the others: its launcher sees first the one that caused it."""

# What gloo says where a process is gone; errors of NCCL and of the store have a class of their own.
LOST = re.compile("gloo|closed by peer|reset by peer|pair closure|broken pipe|timed out", re.IGNORECASE)

LOST_PROCESS = 3
"""Exit status of a process that lost the others."""


class LostProcess(ConnectionError):  # noqa: N818 - what happened, as users say it
    """Another process is gone, hangs, or cannot be reached."""


class Heartbeat(threading.Thread):
    """Writes this process's last step into the processes' common store, and reads what the others wrote."""

    def __init__(self, strategy: DDPStrategy, timeout: float) -> None:
        super().__init__(name="heartbeat", daemon=True)
        self._strategy, self._timeout, self._interval = strategy, timeout, min(5.0, timeout / 10)
        self._main, self._stop_now = threading.get_ident(), False
        store = dist.distributed_c10d._get_default_store().clone()  # type: ignore[attr-defined]
        self._store = dist.PrefixStore("heartbeat", store)  # type: ignore[attr-defined]
        self._keys = [str(rank) for rank in range(strategy.world_size)]
        self._words = ["0|0|the start"] * strategy.world_size
        self._when = [time.monotonic()] * strategy.world_size
        self._warned: set[int] = set()

    def run(self) -> None:
        """Beat at every step and every interval until told to stop, or until the store is gone."""
        own, beats, heard = self._keys[self._strategy.rank], 0, 0.0
        with contextlib.suppress(dist.DistError):
            while not self._stop_now:
                self._strategy.noted.wait(self._interval)
                self._strategy.noted.clear()
                beats += 1
                self._store.set(own, f"{beats}|{self._strategy.steps}|{self._place()}")
                if time.monotonic() - heard >= self._interval and self._store.check(self._keys):
                    self._listen()
                    heard = time.monotonic()
            self._store.set(own, LEFT)

    def close(self) -> None:
        """Stop, without waiting for a store that does not answer."""
        self._stop_now = True
        self._strategy.noted.set()
        self.join(timeout=1.0)
        if self.is_alive():  # A thread that hears from the store while the interpreter ends would abort it.
            atexit.register(_end_at_once)

    def describe(self) -> str:
        """Say which processes have not been heard of for a while, or where all others were last."""
        silent = self._silent(3 * self._interval)
        if self._strategy.rank in silent:  # It does not even hear of itself.
            return f"Their common store, which process 0 or its launcher keeps, does not answer. {self._sentence(0)}"
        others = [rank for rank, words in enumerate(self._words) if rank != self._strategy.rank and words != LEFT]
        named = silent or sorted(others, key=self._when.__getitem__)
        rest = f" So it is with {len(named) - SHOWN} more." if len(named) > SHOWN else ""
        return " ".join(self._sentence(rank) for rank in named[:SHOWN]) + rest

    def _listen(self) -> None:
        words, now = [said.decode() for said in self._store.multi_get(self._keys)], time.monotonic()
        for rank, (said, before) in enumerate(zip(words, self._words, strict=True)):
            if said != before:
                self._words[rank], self._when[rank] = said, now
        self._warn()

    def _warn(self) -> None:
        """Name a process that is silent for half of the timeout, once, and on one process only."""
        silent = self._silent(self._timeout / 2)
        speaker = min(set(range(self._strategy.world_size)) - {*silent}, default=-1)
        for rank in {*silent} - self._warned if speaker == self._strategy.rank else ():
            print(f"{self._sentence(rank)} The run gives up after {self._timeout:.0f} s.", file=sys.stderr, flush=True)
        self._warned = {*silent}

    def _silent(self, seconds: float) -> list[int]:
        now = time.monotonic()
        return [rank for rank, at in enumerate(self._when) if now - at > seconds and self._words[rank] != LEFT]

    def _sentence(self, rank: int) -> str:
        if self._words[rank] == LEFT:
            return f"Process {rank} has ended."
        _, steps, place = self._words[rank].split("|")
        seconds = time.monotonic() - self._when[rank]
        return f"Process {rank} was last heard of {seconds:.1f} s ago, after step {steps} and in {place}."

    def _place(self) -> str:
        """Name the innermost function of ours that the main thread is in."""
        frame = sys._current_frames().get(self._main)
        while frame is not None and not frame.f_code.co_filename.startswith(ROOT):
            frame = frame.f_back
        if frame is None:
            return "the program that trains"
        return f"{frame.f_code.co_name} ({Path(frame.f_code.co_filename).name}:{frame.f_lineno})"


def _end_at_once() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(LOST_PROCESS)


@contextlib.contextmanager
def watched(strategy: DDPStrategy, timeout: float) -> Iterator[None]:
    """While it is entered, the processes hear of each other; one that loses the others says what it knows of them.

    Raises:
        LostProcess: If a collective failed because a process is gone, hangs or cannot be reached.
    """
    heartbeat = Heartbeat(strategy, timeout)
    heartbeat.start()
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not LOST.search(str(error)):
            raise
        reason, known = str(error).splitlines()[0].rpartition("] ")[2], heartbeat.describe()
        time.sleep(PAUSE)
        lost = f"Process {strategy.rank} lost the others after step {strategy.steps}"
        raise LostProcess(f"{lost}: {reason}. {known}") from error
    finally:
        heartbeat.close()
