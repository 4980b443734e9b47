"""Weights & Biases: a run on its server, or offline in the run's folder until ``wandb sync`` uploads it."""

import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from gatewright.extras import require
from gatewright.tasks import DataSplit
from gatewright.train.tracking.base import RunStatus, Tracker, TrackingConfig

FINISH_SECONDS = 60.0
"""How long to wait at the end for a server that takes its time."""


class WandbTracker(Tracker):
    """An open run of Weights & Biases. Its library sends everything in a process of its own.

    Args:
        run: What ``wandb.init`` returned.
    """

    def __init__(self, run: Any) -> None:
        self.run_id = run.id
        folder = shlex.quote(str(Path(run.dir).parent))
        self.location = (
            f"Weights & Biases: {f'offline, upload it with: wandb sync {folder}' if run.offline else run.url}"
        )
        self._run = run
        # A resumed run begins before the last point that was logged, which a step of W&B's own cannot do.
        run.define_metric("*", step_metric="step")

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Make the settings the config of the run."""
        self._run.config.update(dict(parameters), allow_val_change=True)

    def log_data(self, data: Sequence[DataSplit]) -> None:
        """Add to the config which data the run uses."""
        self._run.config.update({"data_splits": [asdict(split) for split in data]}, allow_val_change=True)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Log one point of each metric."""
        self._run.log({"step": step, **metrics})

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Keep a file with the run, below the name of its folder, and show it if it is a picture."""
        kept = Path(self._run.dir, folder or path.resolve().parent.name, path.name)  # W&B has a config.yaml of its own
        kept.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(path, kept)
        self._run.save(str(kept), base_path=self._run.dir, policy="now")
        if path.suffix == ".png":
            self._run.log({path.stem: require("wandb", "wandb").Image(str(path))})

    def close(self, status: RunStatus) -> None:
        """End the run, which has failed unless it is finished."""
        self._run.finish(exit_code=int(status != "FINISHED"))


def open_tracker(config: TrackingConfig, *, output: Path, run_name: str, resume_id: str | None = None) -> WandbTracker:
    """Start a run in the project `tracking.experiment`, or go on with one; the variable WANDB_MODE may say offline.

    Raises:
        ConnectionError: If the server does not answer, or does not know the user.
    """
    wandb = require("wandb", "wandb")
    server = {"base_url": config.uri} if config.uri else {}
    settings = wandb.Settings(console="off", silent=True, finish_timeout=FINISH_SECONDS, **server)
    names = {"project": config.experiment, "name": run_name, "id": resume_id}
    try:
        run = wandb.init(**names, dir=output, resume="allow", reinit="create_new", settings=settings)
    except (wandb.errors.Error, OSError) as error:
        raise ConnectionError(
            f"cannot log to Weights & Biases ({' '.join(str(error).split())}). Log in with: wandb login, or set "
            "WANDB_MODE=offline to upload the run later, or set `tracking.enabled=False` to write metrics.jsonl only."
        ) from error
    return WandbTracker(run)
