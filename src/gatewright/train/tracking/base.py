"""Where a run's numbers go: always a file beside the run, and an MLflow store or server unless turned off."""

import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

from gatewright.tasks import DataSplit

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where to log to, and how often.

    Any URI that MLflow understands will do. Azure ML is `azureml://...` with the `azureml-mlflow` package installed.

    Args:
        enabled: Whether to log to MLflow. `metrics.jsonl` is written either way.
        uri: The MLflow store or server. By default `$MLFLOW_TRACKING_URI`, else a SQLite store beside the run's folder.
            A SQLite store keeps its files in `mlartifacts` beside the database.
        experiment: The name under which MLflow groups the runs. It is created when it does not exist.
        log_interval: Optimizer steps between two logged training points.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "gatewright"
    log_interval: int = 20

    def __post_init__(self) -> None:
        """Reject an interval without steps."""
        if self.log_interval < 1:
            raise ValueError(f"log_interval ({self.log_interval}) must be at least 1 optimizer step")
        if not self.experiment:
            raise ValueError("tracking.experiment is a name, and empty; leave it out for 'gatewright'.")


@runtime_checkable
class Tracker(Protocol):
    """What the training loop may ask for. No method waits for a server, but for `close`, which waits a few seconds."""

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run, to be kept in the checkpoint and handed back on resume; None without MLflow."""

    @property
    def location(self) -> str:
        """Say in one sentence where to look at the run."""

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


class RunTracker:
    """The `Tracker` behind `start_tracking`: `metrics.jsonl`, and an MLflow run where there is one.

    Args:
        metrics_path: The file to append to, one JSON object per line.
        mlflow_run: The MLflow run to tell the same.
    """

    def __init__(self, metrics_path: Path, mlflow_run: Any | None = None) -> None:
        self._mlflow_run = mlflow_run
        self._metrics_path = metrics_path
        written = metrics_path.read_bytes() if metrics_path.exists() else b""
        # Line buffering: a run that is killed loses at most the line it was writing.
        self._file = metrics_path.open("a", buffering=1, encoding="utf-8")
        if written and not written.endswith(b"\n"):
            self._file.write("\n")

    @property
    def run_id(self) -> str | None:
        """MLflow's name of the run."""
        return self._mlflow_run.run_id if self._mlflow_run else None

    @property
    def location(self) -> str:
        """Say in one sentence where to look at the run."""
        return self._mlflow_run.location if self._mlflow_run else f"Metrics: {self._metrics_path}"

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Log the resolved config to MLflow."""
        if self._mlflow_run:
            self._mlflow_run.log_parameters(parameters)

    def log_data(self, data: Sequence[DataSplit]) -> None:
        """Log the parts of the data set to MLflow."""
        if self._mlflow_run:
            self._mlflow_run.log_data(data)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one line to the file, and tell MLflow."""
        values = {name: float(value) for name, value in metrics.items()}
        now = time.time()
        line = {"step": step, "time": now, "values": {name: _as_json(value) for name, value in values.items()}}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        if self._mlflow_run:
            self._mlflow_run.log_metrics(values, step, now)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Copy a file or a folder to the MLflow run, later."""
        if self._mlflow_run:
            self._mlflow_run.log_artifact(path, folder)

    def close(self, status: RunStatus) -> None:
        """Close the file, deliver what is still queued and end the MLflow run."""
        self._file.close()
        if self._mlflow_run:
            self._mlflow_run.close(status)


class NoTracker:
    """What a process has that is not the run's first: it logs nothing."""

    run_id: str | None = None
    location = "tracked by the first process"

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Do nothing."""

    def log_data(self, data: Sequence[DataSplit]) -> None:
        """Do nothing."""

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Do nothing."""

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Do nothing."""

    def close(self, status: RunStatus) -> None:
        """Do nothing."""


def start_tracking(config: TrackingConfig, *, output: Path, run_name: str, resume_id: str | None = None) -> Tracker:
    """Open the run's metrics file and, unless turned off, its MLflow run.

    The first run of all creates a SQLite store, which takes MLflow several seconds.

    Args:
        config: Where to log to.
        output: The run's folder. The default store, `mlflow.db` and `mlartifacts`, lies beside it.
        run_name: What MLflow shows as the run's name.
        resume_id: The `run_id` of the run to go on with.

    Raises:
        ConnectionError: The MLflow store or server does not answer.
    """
    output.mkdir(parents=True, exist_ok=True)
    metrics_path = output / "metrics.jsonl"
    if not config.enabled:
        return RunTracker(metrics_path)
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    mlflow = import_module("gatewright.integrations.mlflow.tracker")
    mlflow_run = mlflow.open_run(
        uri or f"sqlite:///{(output.resolve().parent / 'mlflow.db').as_posix()}",
        experiment=config.experiment,
        run_name=run_name,
        resume_id=resume_id,
        tags={"gatewright.output": str(output.resolve())},
    )
    return RunTracker(metrics_path, mlflow_run)


def _as_json(value: float) -> float | str:
    """Spell what JSON has no number for the way `float` reads it back."""
    return value if math.isfinite(value) else str(value)
