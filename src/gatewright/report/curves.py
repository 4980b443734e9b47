"""Line charts over a run's optimizer steps: losses, accuracies, the learning rate, and the load of the experts."""

import json
import math
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from gatewright.report.figure import COLOURS, GREY, GRID

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Metric -> optimizer step -> value.
Curves = dict[str, dict[int, float]]

# What belongs into which panel: "loss", "train/task_loss", "val_accuracy", but not a layer's auxiliary losses.
PANELS = {
    "loss": r"(\w+[/.])?((task|train|val|test|holdout)_)?(loss|cross_entropy)",
    "accuracy (%)": r"(\w+[/.])?((train|val|test|holdout)_)?(accuracy|acc)",
    "bits per byte": r"(\w+[/.])?bits_per_byte",
    "learning rate": r"(\w+[/.])?(lr|learning_rate)",
}
# A metric's first word, as a legend says it; each has its colour, the same in every panel.
SPLITS = {"train": "training", "holdout": "held out", "test": "test set"}
# With fewer points than the first a line is not smoothed; with more than the second its points are not marked.
MIN_SMOOTHED = 12
MAX_MARKED = 40


def read_metrics(path: Path) -> Curves:
    """Return name -> step -> value of a `metrics.jsonl`.

    A resumed run repeats the steps after its checkpoint: the later line counts. A line that a killed run left
    unfinished is passed over.
    """
    curves: Curves = defaultdict(dict)
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            point = json.loads(line)
        except json.JSONDecodeError:
            continue
        for name, value in point["values"].items():
            curves[name][point["step"]] = float(value)
    return dict(curves)


def load_curves(curves: Curves, layer_name: str) -> tuple[list[int], Float[Tensor, "points experts"]] | None:
    """Return the steps and the experts' shares of one layer in training; None where they were not logged."""
    prefix = f"train/layers/{layer_name}/load/"
    names = sorted((name for name in curves if name.startswith(prefix)), key=lambda name: int(name[len(prefix) :]))
    if not names:
        return None
    steps = sorted(curves[names[0]])
    return steps, Tensor([[curves[name][step] for name in names] for step in steps])


def smooth(values: Sequence[float]) -> list[float]:
    """Return an exponential moving average over about a fifteenth of the points; it passes over what is not finite."""
    keep = 1 - 2 / (max(len(values) / 15, 3) + 1)
    total = weight = 0.0
    averages = []
    for value in values:
        if math.isfinite(value):
            total, weight = keep * total + value, keep * weight + 1
        averages.append(total / weight if weight else math.nan)
    return averages


def panels(curves: Curves) -> list[str]:
    """Name the quantities of which something was logged: those of `PANELS`, and the task's own figures between them."""
    own = {name.partition("/")[2].replace("_", " ") for name in curves if re.fullmatch(r"(holdout|test)/\w+", name)}
    first, *last = PANELS
    names = [first, *sorted(own - {"accuracy", "train seconds", *PANELS}), *last]
    return [quantity for quantity in names if _names(quantity, curves)]


def _names(quantity: str, curves: Curves) -> list[str]:
    pattern = PANELS.get(quantity, rf"(holdout|test)/{quantity.replace(' ', '_')}")
    return [name for name in curves if re.fullmatch(pattern, name)]


def draw_panel(axes: "Axes", quantity: str, curves: Curves) -> None:
    """Draw what was logged of one quantity of `panels`; a training loss also smoothed, over its raw line."""
    names = _names(quantity, curves)
    scale = 100 if "%" in quantity else 1
    known = [name.partition("/")[0] for name in names]
    places = [list(SPLITS).index(split) if split in SPLITS else len(SPLITS) + i for i, split in enumerate(known)]
    for name, split, place in zip(names, known, places, strict=True):
        steps, values = zip(*sorted(curves[name].items()), strict=True)
        text = "" if quantity == "learning rate" else SPLITS.get(split, name)
        smoothed = quantity == "loss" and split not in ("holdout", "test")
        _draw_line(axes, steps, [scale * value for value in values], COLOURS[place % len(COLOURS)], text, smoothed)
    axes.grid(axis="y", color=GRID, linewidth=0.8)


def _draw_line(
    axes: "Axes", steps: Sequence[int], values: Sequence[float], colour: str, text: str, smoothed: bool
) -> None:
    """Draw a line under a name; of a noisy one also a smoothed line, over the raw one."""
    axes.locator_params(axis="x", integer=True)  # There is no half of an optimizer step.
    if smoothed and len(steps) >= MIN_SMOOTHED:
        axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
        axes.plot(steps, smooth(values), color=colour, linewidth=1.8, label=text or None)
    else:
        marker = "o" if len(steps) < MAX_MARKED else ""
        axes.plot(steps, values, color=colour, linewidth=1.5, marker=marker, markersize=3, label=text or None)


def draw_load(axes: "Axes", steps: Sequence[int], loads: Float[Tensor, "points experts"]) -> None:
    """Draw each expert's share of the assignments, smoothed over the raw line; the axis fits the lines.

    Up to eight experts have a colour each. Of more, the four busiest and the four idlest at the end have one. The
    legend gives the last share.
    """
    percent = 100 * loads.double().cpu().numpy()
    num_experts = percent.shape[1]
    ranking = loads[-1].argsort(descending=True, stable=True).tolist()
    half = len(COLOURS) // 2
    named = range(num_experts) if num_experts <= len(COLOURS) else ranking[:half] + ranking[-half:]
    for expert in set(range(num_experts)).difference(named):
        axes.plot(steps, percent[:, expert], color=GREY, linewidth=0.7)
    for colour, expert in zip(COLOURS, named, strict=False):
        text = f"expert {expert} ({percent[-1, expert]:.1f}%)"
        _draw_line(axes, steps, percent[:, expert].tolist(), colour, text, smoothed=True)
    if num_experts > len(named):
        axes.plot([], [], color=GREY, label=f"{num_experts - len(named)} others")
    even = 100 / num_experts
    axes.axhline(even, color="black", linestyle="--", linewidth=1, label=f"even share ({even:.3g}%)")
    low, high = min(percent.min(), even), max(percent.max(), even)
    room = max(0.08 * (high - low), 0.5)
    axes.set_ylim(max(low - room, -0.5), min(high + room, 100.5))
    axes.margins(x=0.01)
