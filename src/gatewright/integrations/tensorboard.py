"""TensorBoard: the curves, the settings and the pictures of a run as event files."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
from PIL import Image

from gatewright.extras import require
from gatewright.tasks import DataSplit
from gatewright.train.tracking.base import RunStatus, Tracker, TrackingConfig


class TensorBoardTracker(Tracker):
    """Writes event files into a folder, which TensorBoard finds below the folder that it is shown.

    Args:
        folder: The folder of the event files.
    """

    def __init__(self, folder: str) -> None:
        require("tensorboard", "tensorboard")
        self.location = f"TensorBoard: run tensorboard --logdir {folder}"
        self._writer = require("torch.utils.tensorboard", "tensorboard").SummaryWriter(folder)

    def log_parameters(self, parameters: Mapping[str, object]) -> None:
        """Write the settings as a text."""
        self._write_text("settings", parameters)

    def log_data(self, data: Sequence[DataSplit]) -> None:
        """Write as a text which data the run uses."""
        self._write_text("data", [asdict(split) for split in data])

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one point of each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, step)

    def log_artifact(self, path: Path, folder: str | None = None) -> None:
        """Write a picture; TensorBoard shows no other files."""
        if path.suffix == ".png":
            with Image.open(path) as picture:
                self._writer.add_image(path.stem, np.asarray(picture.convert("RGB")), dataformats="HWC")

    def close(self, status: RunStatus) -> None:
        """Write how the run ended, and close the file."""
        self._writer.add_text("status", status)
        self._writer.close()

    def _write_text(self, name: str, content: object) -> None:
        lines = json.dumps(content, indent=2).splitlines()
        self._writer.add_text(name, "\n".join(f"    {line}" for line in lines))  # indented, it is code in Markdown


def open_tracker(
    config: TrackingConfig, *, output: Path, run_name: str, resume_id: str | None = None
) -> TensorBoardTracker:
    """Open the event file of a run, in its own folder or in a folder of its name below `tracking.uri`.

    A resumed run writes a further file into the same folder, which TensorBoard shows as one run.
    """
    return TensorBoardTracker(f"{config.uri}/{output.name}" if config.uri else str(output / "tensorboard"))
