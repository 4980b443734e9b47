"""The file of an export: the weights of an evaluated model, with what it was trained for in the header."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from gatewright.atomic import atomic_write
from gatewright.extras import require
from gatewright.train.config import RunConfig
from gatewright.train.config_file import config_text, read_config
from gatewright.train.tracking.base import TrackingConfig

if TYPE_CHECKING:
    from gatewright.train.checkpoint.restore import Trained


def save_export(trained: "Trained", path: Path) -> None:
    """Write a model's weights under their own names, and what it was trained for into the header."""
    header = {
        "format": "pt",
        "config": config_text(public_config(trained.config)),
        **{name: json.dumps(value) for name, value in trained.fingerprint.items()},
    }
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in trained.model.state_dict().items()}
    content = require("safetensors.torch", "train").save(tensors, header)
    with atomic_write(path) as partial:
        partial.write_bytes(content)


def public_config(config: RunConfig) -> RunConfig:
    """Return the settings of a run without where it was kept and tracked: a tracker's URI may hold a password."""
    return replace(config, output=None, tracking=TrackingConfig())


def read_export(file: Path) -> tuple[RunConfig, dict[str, Tensor], Mapping[str, Any]]:
    """Read the settings, the weights and the fingerprint of the data that `save_export` wrote.

    Raises:
        ValueError: If it is another file, or broken.
    """
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
    return config, weights, {name: json.loads(value) for name, value in header.items() if name != "format"}
