"""All pictures of a finished run, from the files in its folder."""

import json
import re
from pathlib import Path

import torch

from gatewright.report.curves import Curves, load_curves, read_metrics
from gatewright.report.facts import class_names_of, class_word
from gatewright.report.page import write_report
from gatewright.report.plots import plot_class_by_expert, plot_confusion, plot_load_over_time, plot_training_curves


def write_all(output: Path) -> list[Path]:
    """Write the pictures and the page of a finished run into its folder, and return their paths.

    Hand it to `gatewright.train.train` as its `report`, and they are tracked with the run.

    Args:
        output: The run's folder.
    """
    return [*write_pictures(output), write_report(output)]


def write_pictures(output: Path) -> list[Path]:
    """Draw what `result.json` and `metrics.jsonl` hold: the curves, the confusion, and two pictures per MoE layer.

    Args:
        output: The run's folder, where the pictures go too.
    """
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    class_names = class_names_of(result)
    curves = read_metrics(output / "metrics.jsonl")
    written = [plot_training_curves(output / "metrics.jsonl", output / "curves.png")]
    if result.get("confusion"):
        written.append(plot_confusion(torch.tensor(result["confusion"]), class_names, output / "confusion.png"))
    for name, layer in result["layers"].items():
        written += _load_over_time(output, name, curves)
        if layer["class_by_expert"]:
            counts = torch.tensor(layer["class_by_expert"])
            tokens = torch.tensor(layer["tokens_per_class"])
            path, word = picture_path(output, "classes", name), class_word(result)
            title = f"Experts by {word} on the test set: {name}"
            written.append(plot_class_by_expert(counts, tokens, class_names, path, title, word))
    return written


def picture_path(output: Path, kind: str, layer_name: str) -> Path:
    """Return where a layer's picture lies; `kind` is "load" or "classes"."""
    plain_name = re.sub(r"[^\w.-]", "_", layer_name)
    return output / f"{kind}-{plain_name}.png"


def _load_over_time(output: Path, layer_name: str, curves: Curves) -> list[Path]:
    found = load_curves(curves, layer_name)
    if found is None:
        return []
    title = f"Load in training, with the router's noise: {layer_name}"
    return [plot_load_over_time(*found, picture_path(output, "load", layer_name), title)]
