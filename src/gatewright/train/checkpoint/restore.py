"""A trained model from a run's folder or an export of it, ready to evaluate or predict; the data set is not needed."""

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from gatewright.parallel import whole_state
from gatewright.tasks import Task, task_named
from gatewright.train.checkpoint.export import read_export
from gatewright.train.checkpoint.resume import saved_fingerprint
from gatewright.train.config import RunConfig
from gatewright.train.config_file import load_config
from gatewright.train.folder import CONFIG, newest_intact
from gatewright.train.phases import dense_phase
from gatewright.train.state import load_weights

PRETRAINED = "model.safetensors"
"""The file in the folder of a pretrained model, an export, by the name that Hugging Face's hub gives to weights."""


@dataclass(frozen=True)
class Trained:
    """A trained model and what it was trained for.

    Args:
        config: The run; of one that has only trained its dense network so far, with that as its model.
        model: The trained model in evaluation mode, with averaged weights where the run kept them.
        fingerprint: Fingerprint, by its task, of the data that it was trained on.
        result: What ``result.json`` beside it says of it; empty where there is none, or it is of an earlier end.
    """

    config: RunConfig
    model: nn.Module
    fingerprint: Mapping[str, Any]
    result: Mapping[str, Any] = field(default_factory=dict)

    @property
    def task(self) -> Task:
        """The task that it was trained for."""
        return task_named(self.config.task)


def load_run(path: str | Path) -> Trained:
    """Load a run by its folder, a file that ``gatewright export`` wrote, or the folder of a pretrained model.

    Of a run, the newest checkpoint is loaded. A pretrained model is what `gatewright.integrations.hub` saves.

    Raises:
        FileNotFoundError: If the folder holds neither, or a run that has no checkpoint yet.
        ValueError: If config, checkpoint or file are broken, or do not belong together.
    """
    path = Path(path)
    exported = path / PRETRAINED if path.is_dir() else path
    if (path / CONFIG).is_file():
        config, weights, fingerprint = _read_run(path)
    elif exported.is_file():
        config, weights, fingerprint = read_export(exported)
    else:
        raise FileNotFoundError(
            f"No run at {path}: it has no {CONFIG}, and no {PRETRAINED} as a pretrained model has. Name a folder that "
            "train or save_pretrained wrote, or a file that gatewright export wrote."
        )
    return Trained(config, _model(path, config, weights, fingerprint), fingerprint, _result(path, config))


def _read_run(output: Path) -> tuple[RunConfig, dict[str, Tensor], Mapping[str, Any]]:
    """Read the settings, the weights that were evaluated and the fingerprint of the data of a run."""
    config = load_config(output / CONFIG)
    state, damaged = newest_intact(output)
    if state is None:
        raise FileNotFoundError(f"The run at {output} has no checkpoint yet. Train it on with `resume=True`.")
    for path in damaged:
        step = state["engine"]["step_count"]
        print(f"warning: {path} is damaged; this is the model of step {step}.", file=sys.stderr)
    if state["position"].get("dense", False):
        config = dense_phase(config)
    weights = whole_state(state["engine"]["average"] or state["engine"]["model"])
    return config, weights, saved_fingerprint(state)


def _model(path: Path, config: RunConfig, weights: dict[str, Tensor], fingerprint: Mapping[str, Any]) -> nn.Module:
    """Build the model for its data, in evaluation mode, and load its weights."""
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
    return model.eval()


def _result(folder: Path, config: RunConfig) -> Mapping[str, Any]:
    """Read the result in a folder, unless the run has gone on since then."""
    file = folder / "result.json"
    result: Mapping[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return result if result.get("epochs") == config.epochs else {}
