"""The tracker that every run has: `metrics.jsonl`, a file in the run's folder."""

import json
import math
import time
from collections.abc import Mapping
from pathlib import Path

from gatewright.train.tracking.base import RunStatus, Tracker


class JsonlTracker(Tracker):
    """Appends metrics to a file, one JSON object per line."""

    def __init__(self, path: Path) -> None:
        self.location = f"Metrics: {path}"
        written = path.read_bytes() if path.exists() else b""
        # Line buffering: a run that is killed loses at most the line it was writing.
        self._file = path.open("a", buffering=1, encoding="utf-8")
        if written and not written.endswith(b"\n"):
            self._file.write("\n")

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Write one line."""
        values = {name: _as_json(float(value)) for name, value in metrics.items()}
        self._file.write(json.dumps({"step": step, "time": time.time(), "values": values}, allow_nan=False) + "\n")

    def close(self, status: RunStatus) -> None:
        """Close the file."""
        self._file.close()


def _as_json(value: float) -> float | str:
    """Spell what JSON has no number for the way `float` reads it back."""
    return value if math.isfinite(value) else str(value)
