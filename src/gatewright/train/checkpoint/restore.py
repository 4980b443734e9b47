"""A trained model from a run's folder or an exported file, ready to evaluate or predict; the data set is not needed."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gatewright.extras import require
from gatewright.parallel import whole_state
from gatewright.tasks import Task, task_named
from gatewright.train.checkpoint.resume import saved_fingerprint
from gatewright.train.config import RunConfig
from gatewright.train.config_file import load_config, read_config
from gatewright.train.folder import newest_intact
from gatewright.train.phases import dense_phase
from gatewright.train.state import load_weights


@dataclass(frozen=True)
class Trained:
    """A trained model and what it was trained for.

    Args:
        config: The run; of one that has only trained its dense network so far, with that as its model.
        model: The trained model in evaluation mode, with averaged weights where the run kept them.
        fingerprint: Fingerprint, by its task, of the data that it was trained on.
    """

    config: RunConfig
    model: nn.Module
    fingerprint: Mapping[str, Any]

    @property
    def task(self) -> Task:
        """The task that it was trained for."""
        return task_named(self.config.task)


def load_run(path: str | Path) -> Trained:
    """Load the newest checkpoint in a run's folder, or a file that ``gatewright export`` wrote.

    Raises:
        FileNotFoundError: If the folder holds no run, or no checkpoint yet.
        ValueError: If config, checkpoint or file are broken, or do not belong together.
    """
    path = Path(path)
    return _load_export(path) if path.is_file() else _load_folder(path)


def _load_folder(output: Path) -> Trained:
    config = load_config(output / "config.yaml")
    state, damaged = newest_intact(output)
    if state is None:
        raise FileNotFoundError(f"The run at {output} has no checkpoint yet. Train it on with `resume=True`.")
    for path in damaged:
        step = state["engine"]["step_count"]
        print(f"warning: {path} is damaged; this is the model of step {step}.", file=sys.stderr)
    weights = whole_state(state["engine"]["average"] or state["engine"]["model"])
    if state["position"].get("dense", False):
        config = dense_phase(config)
    return _trained(output, config, weights, saved_fingerprint(state))


def _load_export(file: Path) -> Trained:
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(file, "pt") as opened:
            header = opened.metadata() or {}
            weights = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 it is no dictionary
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} is truncated or not a safetensors file: {error}. Export the run again.") from error
    if "config" not in header:
        raise ValueError(
            f"{file} is no export of a run: its header has no config. Name one that gatewright export wrote."
        )
    config = read_config(header.pop("config"), file)
    fingerprint = {name: json.loads(value) for name, value in header.items() if name != "format"}
    return _trained(file, config, weights, fingerprint)


def _trained(path: Path, config: RunConfig, weights: dict[str, Tensor], fingerprint: Mapping[str, Any]) -> Trained:
    try:
        model = task_named(config.task).build(config.model, fingerprint)
    except KeyError as missing:
        raise ValueError(
            f"{path} does not say what it was trained on: {missing} is missing. Export it again."
        ) from missing
    try:
        load_weights(model, weights)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    return Trained(config, model.eval(), fingerprint)
