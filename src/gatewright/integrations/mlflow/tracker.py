"""One MLflow run: opened with a check that the store answers, then fed through a `RetryQueue`.

Only `MlflowClient` is used and no active run is set, so several runs can be open in one process.
"""

import getpass
import json
import logging
import os
import re
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, is_dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewright.extras import require
from gatewright.integrations.mlflow.store import artifact_location, create_store, database_of
from gatewright.tasks import DataSplit
from gatewright.train.provenance import command
from gatewright.train.tracking.base import RunStatus, Tracker, TrackingConfig
from gatewright.train.tracking.retry_queue import RetryQueue, reason

if TYPE_CHECKING:
    from mlflow import MlflowClient

logger = logging.getLogger("gatewright")

# MLflow itself would ask a silent server seven times over several minutes. The queue asks again on its own, so one
# short question is enough. Telemetry would send usage to the internet from the machine that trains.
ENVIRONMENT = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
}

# The page of a run that shows its metrics. Where the view is not named, MLflow 3 shows that of language models.
METRICS_PAGE = "#/experiments/{experiment_id}/runs/{run_id}/model-metrics?workflowType=machine_learning"
# Where `mlflow ui` answers unless it is told otherwise.
LOCAL_SERVER = "http://127.0.0.1:5000"

# MLflow's words for the parts of a data set.
CONTEXTS = {"training": "training", "held-out": "validation", "test": "test"}

# How many items of a kind one request may carry, and how long a name and a value may be (mlflow.utils.validation).
BATCH_LIMITS = {"metrics": 1000, "parameters": 100, "tags": 100, "data sets": 10}
MAX_NAME_LENGTH = 250
MAX_PARAMETER_LENGTH = 6000


# Answers that stay the same however often one asks.
REFUSALS = ("BAD_REQUEST", "INVALID_PARAMETER_VALUE", "RESOURCE_ALREADY_EXISTS", "RESOURCE_DOES_NOT_EXIST")


class MlflowTracker(Tracker):
    """An open run of an MLflow store or server.

    Args:
        client: A client of that store.
        run_id: The run's name there.
        location: One sentence that says where to look.
        destination: The store's URI, without a password.
        cleanup: A stack that is closed at the end of the run.
        parameters: The parameters that the run has already.
    """

    run_id: str

    def __init__(
        self,
        client: "MlflowClient",
        run_id: str,
        *,
        location: str,
        destination: str,
        cleanup: ExitStack,
        parameters: Mapping[str, str],
    ) -> None:
        self.run_id = run_id
        self._parameters = parameters
        self.location = location
        self._client = client
        self._destination = destination
        self._cleanup = cleanup
        self._queue = RetryQueue(self._send, f"MLflow at {destination}", limits=BATCH_LIMITS, is_refusal=_is_refusal)

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Queue parameters, flattened to `a.b.c` and cut to MLflow's limits.

        MLflow never changes a parameter. One that a resumed run has with another value becomes a tag, `resumed.a.b.c`.
        """
        values, known = dict(flatten(parameters)), self._parameters
        changed = {name: value for name, value in values.items() if known.get(name, value) != value}
        self._queue.put("parameters", [(name, value) for name, value in values.items() if name not in known])
        self._queue.put("tags", [(f"resumed.{name}"[:MAX_NAME_LENGTH], value) for name, value in changed.items()])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue one point of each metric."""
        milliseconds = int(time.time() * 1000)
        self._queue.put("metrics", [(_name(key), value, milliseconds, step) for key, value in metrics.items()])

    def log_data(self, data: Sequence[DataSplit]) -> None:
        """Queue the parts of the data set, which MLflow shows as the run's data sets."""
        self._queue.put("data sets", data)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Queue a file or a folder; it is read when its turn comes."""
        self._queue.put("files", [(str(path), folder)])

    def close(self, status: RunStatus) -> None:
        """End the run, wait a bounded time for the queue to empty, and say what was not delivered."""
        missing = self._queue.close(("end of run", status))
        self._cleanup.close()
        if missing:
            counts = ", ".join(f"{count} {kind}" for kind, count in missing.items())
            logger.warning("Not delivered to MLflow at %s: %s. metrics.jsonl is complete.", self._destination, counts)

    def _send(self, kind: str, payloads: list[Any]) -> None:
        from mlflow.entities import Metric, Param, RunTag

        match kind:
            case "metrics":
                self._client.log_batch(self.run_id, metrics=[Metric(*payload) for payload in payloads])
            case "parameters":
                self._client.log_batch(self.run_id, params=[Param(*payload) for payload in payloads])
            case "data sets":
                self._client.log_inputs(self.run_id, [_data_input(split) for split in payloads])
            case "tags":
                self._client.log_batch(self.run_id, tags=[RunTag(*payload) for payload in payloads])
            case "files":
                self._client.log_artifact(self.run_id, *payloads[0])
            case "end of run":
                self._client.set_terminated(self.run_id, *payloads)


def _is_refusal(error: Exception) -> bool:
    return isinstance(error, FileNotFoundError) or getattr(error, "error_code", None) in REFUSALS


def open_tracker(config: TrackingConfig, *, output: Path, run_name: str, resume_id: str | None) -> MlflowTracker:
    """Create a run, or open the one to resume. The first run of all creates a SQLite store, which takes seconds.

    Args:
        config: The store or server, and the experiment.
        output: The run's folder. The default store, `mlflow.db` and `mlartifacts`, lies beside it.
        run_name: The name of a new run.
        resume_id: The run to resume. One that the store does not know is replaced by a new run.

    Raises:
        ConnectionError: If the store or server does not answer, or not as MLflow does.
    """
    beside = f"sqlite:///{(output.resolve().parent / 'mlflow.db').as_posix()}"
    uri = config.uri or os.environ.get("MLFLOW_TRACKING_URI") or beside
    destination = re.sub(r"//[^/@]*@", "//", uri)  # without the password
    with ExitStack() as stack:
        stack.enter_context(_environment())
        mlflow = require("mlflow", "train")
        try:
            with _quiet("alembic", "mlflow.store.db.utils"):
                create_store(uri)
                client = mlflow.MlflowClient(tracking_uri=uri)
                experiment_id = _experiment_id(client, config.experiment, artifact_location(uri))
                tags = {**_source_tags(), "gatewright.output": str(output.resolve())}
                run_id = _run_id(client, experiment_id, run_name, resume_id, tags)
                parameters = client.get_run(run_id).data.params
        except Exception as error:
            way_on = f"Move {database_of(uri)} away to begin another store" if database_of(uri) else "Start that server"
            raise ConnectionError(
                f"cannot log to MLflow at {destination} ({reason(error)}). "
                f"{way_on}, or unset MLFLOW_TRACKING_URI to log to a local SQLite store, "
                "or set `tracking.enabled=False` to write metrics.jsonl only."
            ) from error
        location = _location(destination, experiment_id, run_id)
        cleanup = stack.pop_all()
        return MlflowTracker(
            client, run_id, location=location, destination=destination, cleanup=cleanup, parameters=parameters
        )


def _experiment_id(client: "MlflowClient", name: str, location: str | None) -> str:
    mlflow = require("mlflow", "train")
    if (found := client.get_experiment_by_name(name)) is not None:
        return str(found.experiment_id)
    try:
        return str(client.create_experiment(name, location))
    except mlflow.MlflowException:
        # A run that started at the same moment may have been faster.
        if (found := client.get_experiment_by_name(name)) is None:
            raise
        return str(found.experiment_id)


def _run_id(
    client: "MlflowClient", experiment_id: str, run_name: str, resume_id: str | None, tags: dict[str, Any]
) -> str:
    mlflow = require("mlflow", "train")
    if resume_id is not None:
        try:
            client.update_run(resume_id, status="RUNNING")
            return resume_id
        except mlflow.MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            logger.warning("MLflow does not know the run %s: going on in a new one", resume_id)
    run = client.create_run(experiment_id, run_name=run_name, tags=tags)
    return str(run.info.run_id)


def _source_tags() -> dict[str, str]:
    """Return what MLflow shows as a run's source and user, and the command in full."""
    called = command()
    tags = {
        "gatewright.version": version("gatewright"),
        "gatewright.command": called,
        "mlflow.source.name": "gatewright" if called.startswith("gatewright ") else Path(sys.argv[0]).name,
        "mlflow.source.type": "LOCAL",
    }
    with suppress(KeyError, OSError):  # A container may run under a user that has no name.
        tags["mlflow.user"] = getpass.getuser()
    return tags


def _data_input(split: DataSplit) -> Any:
    from mlflow.entities import Dataset, DatasetInput, InputTag

    data_set = Dataset(
        split.name,
        split.digest,
        source_type="local",
        source=json.dumps({"uri": split.source}),
        profile=json.dumps({"num_rows": split.num_items}),
    )
    return DatasetInput(data_set, [InputTag("mlflow.data.context", CONTEXTS[split.split])])


def _location(destination: str, experiment_id: str, run_id: str) -> str:
    page = METRICS_PAGE.format(experiment_id=experiment_id, run_id=run_id)
    if destination.startswith(("http://", "https://")):
        return f"MLflow: {destination.rstrip('/')}/{page}"
    if destination.startswith("sqlite:"):
        return f"MLflow: run mlflow ui --backend-store-uri {shlex.quote(destination)} and open '{LOCAL_SERVER}/{page}'"
    return f"MLflow: run {run_id} at {destination}"


def flatten(parameters: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yield (`a.b.c`, text) for nested mappings and dataclasses, cut to MLflow's limits."""
    for key, value in parameters.items():
        if is_dataclass(value) and not isinstance(value, type):
            value = asdict(value)
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield _name(f"{prefix}{key}"), str(value)[:MAX_PARAMETER_LENGTH]


def _name(name: str) -> str:
    """Replace the characters that MLflow allows in no name."""
    return re.sub(r"[^\w\-. /]", "_", name)[:MAX_NAME_LENGTH]


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
