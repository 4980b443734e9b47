"""A run under way: where it stands, and what it holds on to."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gatewright.tasks import DataSplit, Splits, Task
from gatewright.train.checkpoint.writer import Saver
from gatewright.train.config import RunConfig
from gatewright.train.pace import Pace
from gatewright.train.step import TorchEngine
from gatewright.train.tracking.base import Tracker


@dataclass
class Position:
    """Where a run stands; with its config this determines everything that is still to come.

    Args:
        epoch: The epoch under way.
        step: Optimizer steps made in it.
        dense: Whether the network is the dense twin, as it is before `upcycle_epoch`.
        train_seconds: Time in training so far, checkpoints and evaluations on held-out data included.
        tracking_id: The tracker's name for the run, under which a resumed run goes on.
        changes: A sentence for every setting that was changed where the run went on.
    """

    epoch: int = 0
    step: int = 0
    dense: bool = False
    train_seconds: float = 0.0
    tracking_id: str | None = None
    changes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Run:
    """What one run holds on to; `training` is its training data where batches are made, which may be a GPU."""

    config: RunConfig
    recipe: RunConfig | None
    report: Callable[[Path], Sequence[Path]] | None
    output: Path
    task: Task
    splits: Splits
    training: Any
    data: list[DataSplit]
    engine: TorchEngine
    tracker: Tracker
    position: Position
    saver: Saver
    pace: Pace
