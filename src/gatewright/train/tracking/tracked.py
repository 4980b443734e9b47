"""A run under its tracker, which learns how it ended."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gatewright.train.config import RunConfig
from gatewright.train.config_file import settings_of
from gatewright.train.launch.signals import Interrupted
from gatewright.train.strategies.single import Strategy
from gatewright.train.tracking.base import NoTracker, RunStatus, Tracker, start_tracking


@contextlib.contextmanager
def tracked(config: RunConfig, output: Path, resume_id: str | None, strategy: Strategy) -> Iterator[Tracker]:
    """Track a run on its first process, and tell the tracker how it ended.

    Args:
        config: The run.
        output: The run's folder.
        resume_id: As in `start_tracking`.
        strategy: How the run is spread over its processes.

    Raises:
        ConnectionError: The MLflow store or server does not answer.
    """
    if strategy.rank > 0:
        yield NoTracker()
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
