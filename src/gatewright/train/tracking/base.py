"""The tracker interface: where the numbers of a run go."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from gatewright.names import known
from gatewright.settings import settings
from gatewright.tasks import DataSplit

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]

TRACKERS: Mapping[str, str] = {
    "mlflow": "gatewright.integrations.mlflow.tracker:open_tracker",
    "tensorboard": "gatewright.integrations.tensorboard:open_tracker",
    "wandb": "gatewright.integrations.wandb:open_tracker",
}
"""The place of the function that opens each tracker, as ``"module:function"``: imported when a run asks for it.

It is called as ``open_tracker(config, output=..., run_name=..., resume_id=...)`` and returns a `Tracker`.
"""


@settings("tracking")
class TrackingConfig:
    """Settings of the tracker.

    Args:
        enabled: Whether to log to a tracker. `metrics.jsonl` is written either way.
        name: The tracker: ``"mlflow"``, ``"tensorboard"``, ``"wandb"`` (Weights & Biases), or one of your own as
            ``"module:function"``.
        uri: The tracker's store, folder or server. For MLflow it is any URI that MLflow understands, Azure ML's
            `azureml://...` with the `azureml-mlflow` package too. MLflow's default is `$MLFLOW_TRACKING_URI`, or else a
            SQLite store beside the run's folder, with its files in `mlartifacts` beside the database. TensorBoard's
            default is a folder in the run's folder.
        experiment: The name under which the tracker groups runs; a project of Weights & Biases. It is created when it
            does not exist.
        log_interval: Optimizer steps between two logged training points.
    """

    enabled: bool = True
    name: str = "mlflow"
    uri: str | None = None
    experiment: Annotated[str, Field(min_length=1)] = "gatewright"
    log_interval: PositiveInt = 20

    def __post_init__(self) -> None:
        if ":" not in self.name:
            known(self.name, TRACKERS, "tracker")


class Tracker:
    """Where a run is logged to. A tracker overrides the methods for what it keeps; the others do nothing.

    No method waits for a server, except `close`, which waits a few seconds.
    """

    run_id: str | None = None
    """The tracker's name of the run, which is kept in the checkpoint and handed back when the run is resumed."""
    location = "Tracked by the first process."
    """One sentence that says where to look at the run."""

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Log the resolved config; nested mappings become `a.b.c`."""

    def log_data(self, data: Sequence[DataSplit]) -> None:
        """Log which data the run uses."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one point of each metric."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder to the run, later: it must stay where it is until `close`."""

    def close(self, status: RunStatus) -> None:
        """Deliver what is still queued and end the run."""


class Trackers(Tracker):
    """Several trackers as one, which goes by the name and the location of the last."""

    def __init__(self, *trackers: Tracker) -> None:
        self._trackers = trackers
        self.run_id, self.location = trackers[-1].run_id, trackers[-1].location

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Log the resolved config to every tracker."""
        for tracker in self._trackers:
            tracker.log_parameters(parameters)

    def log_data(self, data: Sequence[DataSplit]) -> None:
        """Log the data to every tracker."""
        for tracker in self._trackers:
            tracker.log_data(data)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one point of each metric to every tracker, each value as a float."""
        values = {name: float(value) for name, value in metrics.items()}
        for tracker in self._trackers:
            tracker.log_metrics(values, step)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder to every tracker."""
        for tracker in self._trackers:
            tracker.log_artifact(path, folder)

    def close(self, status: RunStatus) -> None:
        """Close every tracker, in order."""
        for tracker in self._trackers:
            tracker.close(status)
