"""Pictures of a run and of what its experts do. Each function writes one PNG and returns its path."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from jaxtyping import Float, Int, Real
from torch import Tensor

from gatewright.report.comparison import OPERATIONS, SECONDS, Comparison, MeasuredRun
from gatewright.report.curves import draw_load, draw_panel, panels, read_metrics
from gatewright.report.figure import (
    COLOURS,
    GRID,
    MAX_ANNOTATED_COLUMNS,
    MAX_ROOMY_CLASSES,
    draw_shares,
    label,
    legend_below,
    legend_beside,
    legible,
    name_rows,
    new_figure,
    save,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Behind a word that a line may cross.
PAPER = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}


def plot_comparison(comparison: Comparison, path: Path) -> Path:
    """Draw the held-out figure of two groups of runs against the seconds and against the operations of training.

    A dotted line marks how good the runs of the second group are in the end, which those of the first are to reach.
    """
    figure = new_figure(9, 4.5)
    for axes, axis in zip(figure.subplots(1, 2, sharey=True), (SECONDS, OPERATIONS), strict=True):
        for colour, group in zip(COLOURS, (comparison.runs, comparison.others), strict=False):
            for place, run in enumerate(group):
                text = run.name if axis == SECONDS and place == 0 else None
                axes.plot(
                    run.axis(axis), run.held_out, color=colour, linewidth=1.3, marker="o", markersize=2.5, label=text
                )
        reached = [run.held_out[-1] for run in comparison.others]
        axes.axhline(sum(reached) / len(reached), color=COLOURS[1], linestyle=":", linewidth=1.2)
        label(axes, x=f"{axis} of training", y=f"held-out {comparison.figure}" if axis == SECONDS else "")
        axes.grid(axis="y", color=GRID, linewidth=0.8)
    legend_below(figure.axes[0], 2)
    return save(figure, path)


LINES = ("-", "--", ":", "-.")


def plot_groups(groups: Mapping[str, Sequence[MeasuredRun]], path: Path, *, axes: Sequence[str]) -> Path:
    """Draw the held-out figure of many groups of runs over each of some axes: a thin line per run, a thick mean.

    Each mean line bears the name of its group at its right. Early evaluations may lie outside of the picture.
    """
    figure = new_figure(5.5 + 4.5 * len(axes), max(5.0, 0.22 * len(groups) + 1.5))
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, axis in zip(panels, axes, strict=True):
        for place, runs in enumerate(groups.values()):
            colour, dashes = COLOURS[place % len(COLOURS)], LINES[place // len(COLOURS) % len(LINES)]
            for run in runs:
                panel.plot(run.axis(axis), run.held_out, color=colour, linewidth=0.5, alpha=0.5)
            panel.plot(*_mean_line(runs, axis), color=colour, linestyle=dashes, linewidth=1.8)
        label(panel, x=f"{axis} of training", y=f"held-out {_figure(groups)}" if panel is panels[0] else "")
        panel.grid(axis="y", color=GRID, linewidth=0.8)
    late = [value for runs in groups.values() for run in runs for value in run.held_out[len(run.held_out) // 3 :]]
    room = 0.05 * (max(late) - min(late)) or 0.1
    panels[0].set_ylim(min(late) - room, max(late) + room)
    _name_lines(panels[-1], {name: _mean_line(runs, axes[-1]) for name, runs in groups.items()})
    return save(figure, path)


def _figure(groups: Mapping[str, Sequence[MeasuredRun]]) -> str:
    return next(iter(groups.values()))[0].figure


def _mean_line(runs: Sequence[MeasuredRun], axis: str) -> tuple[list[float], list[float]]:
    """Return the means over runs of where each evaluation was, and of what it found."""
    places = zip(*(run.axis(axis) for run in runs), strict=False)
    values = zip(*(run.held_out for run in runs), strict=False)
    return [mean(each) for each in places], [mean(each) for each in values]


def _name_lines(axes: "Axes", lines: Mapping[str, tuple[list[float], list[float]]]) -> None:
    """Write the name of each line beside its end, from top to bottom with a gap between two of them."""
    bottom, top = axes.get_ylim()
    ends = {name: (x[-1], y[-1]) for name, (x, y) in lines.items()}
    gap = (top - bottom) / max(22, len(ends) + 1)
    height = top + gap
    for name in sorted(ends, key=lambda each: -ends[each][1]):
        left = sum(ends[each][1] < ends[name][1] for each in ends)
        height = max(min(ends[name][1], height - gap), bottom + left * gap)
        place = list(lines).index(name)
        axes.annotate(
            name,
            ends[name],
            (1.03, height),
            textcoords=axes.get_yaxis_transform(),
            color=COLOURS[place % len(COLOURS)],
            fontsize=9,
            va="center",
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": GRID, "linewidth": 0.8},
        )


def plot_load_over_time(steps: Sequence[int], loads: Float[Tensor, "points experts"], path: Path, title: str) -> Path:
    """Draw each expert's share of the assignments in training against the optimizer step, as `draw_load` does."""
    figure = new_figure(9, 4.5)
    axes = figure.add_subplot()
    draw_load(axes, steps, loads)
    label(axes, title=title, x="optimizer step", y="share of assignments (%)")
    legend_beside(axes)
    return save(figure, path)


def plot_class_by_expert(
    counts: Real[Tensor, "classes experts"],
    tokens_per_class: Int[Tensor, " classes"],
    class_names: Sequence[str],
    path: Path,
    title: str,
    word: str = "class",
) -> Path:
    """Draw which share of each class's images reaches each expert, and above it each expert's load.

    A class without images is a grey row, and the axes call a class by `word`.
    """
    counts = counts.double().cpu()
    num_classes, num_experts = counts.shape
    percent = 100 * counts / tokens_per_class.cpu()[:, None]
    load = 100 * counts.sum(0) / counts.sum().clamp(min=1)
    row_height = 0.34 if num_classes <= MAX_ROOMY_CLASSES else 0.12
    column_width = 0.62 if num_experts <= MAX_ANNOTATED_COLUMNS else 0.22
    heights = [1.0, num_classes * row_height]
    figure = new_figure(max(6.0, 2.8 + num_experts * column_width), 1.4 + sum(heights))
    strip, cells = figure.subplots(2, 1, sharex=True, height_ratios=heights)
    _draw_load(strip, load)
    label(strip, title=title, y="load (%)")
    texts = [[f"{share:.0f}" for share in row] for row in percent.tolist()]
    draw_shares(cells, percent, texts, f"share of the {word} that reaches it (%)")
    label(cells, x="expert", y=word)
    name_rows(cells, class_names)
    every = 1 if num_experts <= MAX_ANNOTATED_COLUMNS else 4
    cells.set_xticks(range(0, num_experts, every))
    return save(figure, path)


def _draw_load(axes: "Axes", percent: Float[Tensor, " experts"]) -> None:
    even = 100 / len(percent)
    axes.bar(range(len(percent)), percent.numpy(), color=COLOURS[0], width=0.8)
    axes.axhline(even, color="black", linestyle="--", linewidth=1)
    axes.text(1.01, even, "even", transform=axes.get_yaxis_transform(), va="center", fontsize=8)
    for expert in (percent == 0).nonzero().flatten().tolist():
        axes.text(
            expert, even / 20, "dead", rotation=90, ha="center", va="bottom", fontsize=8, color=COLOURS[1], bbox=PAPER
        )


def plot_confusion(matrix: Int[Tensor, "classes classes"], class_names: Sequence[str], path: Path) -> Path:
    """Draw how many images of each true class (rows) were predicted as each class (columns)."""
    matrix = matrix.cpu()
    num_classes = len(class_names)
    percent = 100 * matrix.double() / matrix.sum(1, keepdim=True)
    accuracy = float(matrix.diagonal().sum() / matrix.sum().clamp(min=1))
    cell = 0.5 if num_classes <= MAX_ROOMY_CLASSES else 0.12
    figure = new_figure(3.2 + num_classes * cell, 2.4 + num_classes * cell)
    axes = figure.add_subplot()
    texts = [[str(count) if count else "" for count in row] for row in matrix.tolist()]
    draw_shares(axes, percent, texts, "share of the true class (%)")
    label(axes, title=f"Confusion: {accuracy:.2%} of the images right", x="predicted class", y="true class")
    name_rows(axes, class_names)
    size = 9 if num_classes <= MAX_ROOMY_CLASSES else 6
    names, fonts = legible(class_names)
    axes.set_xticks(range(num_classes), names, fontsize=size, fontfamily=fonts, rotation=90, parse_math=False)
    return save(figure, path)


def plot_training_curves(metrics_path: Path, path: Path) -> Path:
    """Draw what was logged of losses, accuracies, bits per byte and the learning rate against the optimizer step."""
    curves = read_metrics(metrics_path)
    quantities = panels(curves) or ["loss"]
    figure = new_figure(9, max(4.0, 2.5 * len(quantities)))
    every = figure.subplots(len(quantities), 1, sharex=True, squeeze=False)[:, 0]
    for axes, quantity in zip(every, quantities, strict=True):
        draw_panel(axes, quantity, curves)
        label(axes, y=quantity)
        legend_beside(axes)
    every[-1].set_xlabel("optimizer step", fontsize=10)
    return save(figure, path)
