"""Where a run's numbers go: always a file beside the run, and an MLflow store or server unless turned off."""

import json
import logging
import math
import os
import re
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

from gatewright.extras import require
from gatewright.train.mlflow_tracker import MlflowRun, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

# MLflow itself would ask a silent server seven times over several minutes. The outbox asks again on its own, so one
# short question is enough. Telemetry would send usage to the internet from the machine that trains.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

RunStatus = Literal["FINISHED", "FAILED", "KILLED"]


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where to log to, and how often.

    Any URI that MLflow understands will do. Azure ML is `azureml://...` with the `azureml-mlflow` package installed.

    Args:
        enabled: Whether to log to MLflow. `metrics.jsonl` is written either way.
        uri: The MLflow store or server. By default `$MLFLOW_TRACKING_URI`, else a SQLite store beside the run's folder.
        experiment: The name under which MLflow groups the runs. It is created when it does not exist.
        log_interval: Optimizer steps between two logged training points.
    """

    enabled: bool = True
    uri: str | None = None
    experiment: str = "gatewright"
    log_interval: int = 20

    def __post_init__(self) -> None:
        """Reject an interval that would never, or always, log."""
        if self.log_interval < 1:
            raise ValueError(f"log_interval ({self.log_interval}) must be at least 1 optimizer step")


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

    def __init__(self, metrics_path: Path, mlflow_run: MlflowRun | None = None) -> None:
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
    store = output.resolve().parent
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI")
    mlflow_run = _open_run(
        uri or f"sqlite:///{(store / 'mlflow.db').as_posix()}",
        artifact_location=None if uri else str(store / "mlartifacts"),
        experiment=config.experiment,
        run_name=run_name,
        resume_id=resume_id,
    )
    return RunTracker(metrics_path, mlflow_run)


def _open_run(
    uri: str, *, artifact_location: str | None, experiment: str, run_name: str, resume_id: str | None
) -> MlflowRun:
    """Create a run, or open the one to resume.

    Args:
        uri: The MLflow store or server.
        artifact_location: Where a new experiment keeps its files; None leaves it to the store.
        experiment: Created when it does not exist.
        run_name: The new run's name.
        resume_id: The run to go on with. One that the store does not know is replaced by a new run.

    Raises:
        ConnectionError: The store or server does not answer, or not as MLflow does.
    """
    destination = re.sub(r"//[^/@]*@", "//", uri)  # without the password
    with ExitStack() as stack:
        stack.enter_context(_environment())
        mlflow = require("mlflow", "train")
        try:
            with _quiet("alembic", "mlflow.store.db.utils"):
                client = mlflow.MlflowClient(tracking_uri=uri)
                experiment_id = _experiment_id(client, experiment, artifact_location)
                run_id = _run_id(client, experiment_id, run_name, resume_id)
        except Exception as error:
            raise ConnectionError(
                f"cannot log to MLflow at {destination} ({reason(error)}). "
                "Start that server, or unset MLFLOW_TRACKING_URI to log to a local SQLite store, "
                "or pass --tracking.no-enabled to write metrics.jsonl only."
            ) from error
        location = _location(destination, experiment_id, run_id)
        return MlflowRun(client, run_id, location=location, destination=destination, cleanup=stack.pop_all())


def _experiment_id(client: "MlflowClient", name: str, artifact_location: str | None) -> str:
    mlflow = require("mlflow", "train")
    if (found := client.get_experiment_by_name(name)) is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, artifact_location))
    except mlflow.MlflowException:
        # A run that started at the same moment may have been faster.
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)


def _run_id(client: "MlflowClient", experiment_id: str, run_name: str, resume_id: str | None) -> str:
    mlflow = require("mlflow", "train")
    if resume_id is not None:
        try:
            client.update_run(resume_id, status="RUNNING")
            return resume_id
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logging.getLogger("gatewright").warning("MLflow does not know the run %s: going on in a new one", resume_id)
    tags = {"gatewright.version": version("gatewright")}
    return str(client.create_run(experiment_id, run_name=run_name, tags=tags).info.run_id)


def _location(destination: str, experiment_id: str, run_id: str) -> str:
    if destination.startswith(("http://", "https://")):
        return f"MLflow: {destination.rstrip('/')}/#/experiments/{experiment_id}/runs/{run_id}"
    if destination.startswith("sqlite:"):
        return f"MLflow: mlflow ui --backend-store-uri {shlex.quote(destination)}"
    return f"MLflow: run {run_id} at {destination}"


@contextmanager
def _environment() -> Iterator[None]:
    """Set what the user has not set, and take it back: MLflow's client has no other place for these."""
    ours = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    os.environ.update(ours)
    try:
        yield
    finally:
        for name in ours:
            os.environ.pop(name, None)


@contextmanager
def _quiet(*names: str) -> Iterator[None]:
    """Silence loggers for a while: a new SQLite store announces each of its migrations."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.WARNING)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


def _as_json(value: float) -> float | str:
    """Spell what JSON has no number for the way `float` reads it back."""
    return value if math.isfinite(value) else str(value)
