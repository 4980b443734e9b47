"""Many runs, some at once, each a ``gatewright train`` of its own: what is done is kept, and the rest goes on."""

import asyncio
import os
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from gatewright.report.facts import duration
from gatewright.studies.kept import keep
from gatewright.studies.plan import PlannedRun
from gatewright.train import Interrupted

LAST_LINES = 8


@dataclass
class Grid:
    """Runs that are to be made.

    Args:
        runs: The runs, in the order in which they begin.
        jobs: Number of runs at once.
        threads: Threads of each.
    """

    runs: Sequence[PlannedRun]
    jobs: int
    threads: int
    failed: list[PlannedRun] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self) -> list[PlannedRun]:
        """Make all runs, and return those that failed.

        Raises:
            Interrupted: If Ctrl-C or SIGTERM stopped it. Its runs have saved themselves then, and go on next time.
        """
        stopped = "stopped; the same command goes on where this one was"
        try:
            asyncio.run(self._run_all())
        except asyncio.CancelledError as stop:
            raise Interrupted(stopped, signal.SIGTERM) from stop
        except KeyboardInterrupt as stop:
            raise Interrupted(stopped, signal.SIGINT) from stop
        return self.failed

    async def _run_all(self) -> None:
        everything, room = asyncio.current_task(), asyncio.Semaphore(self.jobs)
        assert everything is not None
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, everything.cancel)
        async with asyncio.TaskGroup() as group:
            for number, run in enumerate(self.runs, 1):
                group.create_task(self._run_one(number, run, room))

    async def _run_one(self, number: int, run: PlannedRun, room: asyncio.Semaphore) -> None:
        async with room:
            going_on = " goes on" if (run.folder / "config.yaml").is_file() else ""
            self._say(f"{number} of {len(self.runs)}: {run.title}{going_on}")
            begun = time.monotonic()
            status = await _train(run, self.threads)
            self.seconds.append(time.monotonic() - begun)
            try:
                self._said_of(run, keep(run, self.jobs) if status == 0 else None)
            except (OSError, ValueError) as error:  # It ended, and has no held-out figures.
                self.failed.append(run)
                self._say(f"{run.title} failed: {error}")

    def _said_of(self, run: PlannedRun, result: Mapping[str, Any] | None) -> None:
        """Say how a run ended, and about how long the others will take."""
        left = len(self.runs) - len(self.seconds)
        hence = f"; about {duration(left * sum(self.seconds) / len(self.seconds) / self.jobs)} left" if left else ""
        if result is None:
            self.failed.append(run)
            end = "\n".join(f"    {line}" for line in _log(run).splitlines()[-LAST_LINES:])
            self._say(f"{run.title} failed; the end of {run.folder / LOG}:\n{end}{hence}")
        else:
            figure, value = result["test_headline"]
            self._say(f"{run.title}: {figure} {value} after {duration(self.seconds[-1])}{hence}")

    def _say(self, sentence: str) -> None:
        print(sentence, flush=True)


LOG = "log.txt"


def _log(run: PlannedRun) -> str:
    return (run.folder / LOG).read_text(encoding="utf-8", errors="replace")


async def _train(run: PlannedRun, threads: int) -> int:
    """Begin a run or go on with it, and return its exit status; if this is cancelled the run saves itself first."""
    if (run.folder / "result.json").is_file():
        return 0  # It ended when nobody was there to keep it.
    run.folder.mkdir(parents=True, exist_ok=True)
    resume = ("--resume",) if (run.folder / "config.yaml").is_file() else ()
    environment = {"OMP_WAIT_POLICY": "PASSIVE", **os.environ, "OMP_NUM_THREADS": str(threads)}
    with (run.folder / LOG).open("ab") as log:
        process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", "gatewright", "train", *run.words, *resume),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=log,
            stderr=asyncio.subprocess.STDOUT,
            env=environment,
            start_new_session=True,  # A terminal's Ctrl-C reaches it by way of this process alone.
        )
    try:
        return await process.wait()
    except asyncio.CancelledError:
        process.terminate()
        await process.wait()
        raise
