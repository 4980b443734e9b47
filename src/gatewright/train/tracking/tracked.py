"""Opening the trackers of a run, which learn how it ended."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gatewright.names import imported
from gatewright.train.config import RunConfig
from gatewright.train.config_file import settings_of
from gatewright.train.launch.signals import Interrupted
from gatewright.train.strategies.single import Strategy
from gatewright.train.tracking.base import TRACKERS, RunStatus, Tracker, Trackers, TrackingConfig
from gatewright.train.tracking.jsonl import JsonlTracker


def start_tracking(config: TrackingConfig, *, output: Path, run_name: str, resume_id: str | None = None) -> Tracker:
    """Open the run's metrics file and, unless it is turned off, its tracker; `resume_id` is a `run_id` to go on with.

    Raises:
        ConnectionError: If the tracker's store or server does not answer.
    """
    output.mkdir(parents=True, exist_ok=True)
    path = output / "metrics.jsonl"
    if not config.enabled:
        return JsonlTracker(path)
    open_tracker = imported(TRACKERS.get(config.name, config.name), "tracker")
    tracker = open_tracker(config, output=output, run_name=run_name, resume_id=resume_id)
    return Trackers(JsonlTracker(path), tracker)


@contextlib.contextmanager
def tracked(config: RunConfig, output: Path, resume_id: str | None, strategy: Strategy) -> Iterator[Tracker]:
    """Track a run on its first process, and tell the tracker how it ended."""
    if strategy.rank > 0:
        yield Tracker()
        return
    name = f"{config.recipe}-seed{config.seed}"
    tracker = start_tracking(config.tracking, output=output, run_name=name, resume_id=resume_id)
    status: RunStatus = "FAILED"
    try:
        tracker.log_parameters(settings_of(config))
        yield tracker
        status = "FINISHED"
    except (Interrupted, KeyboardInterrupt):
        status = "KILLED"
        raise
    finally:
        tracker.close(status)
