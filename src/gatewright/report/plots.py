"""Pictures of a run and of what its experts do. Each function writes one PNG and returns its path."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Float, Int, Real
from torch import Tensor

from gatewright.report.comparison import OPERATIONS, SECONDS, Comparison
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

    Args:
        comparison: Two groups of runs of the same seeds.
        path: The PNG to write.
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


def plot_load_over_time(steps: Sequence[int], loads: Float[Tensor, "points experts"], path: Path, title: str) -> Path:
    """Draw each expert's share of the assignments in training against the optimizer step, as `draw_load` does.

    Args:
        steps: The optimizer step of each point.
        loads: Shares in [0, 1], a row per point.
        path: The PNG to write.
        title: The heading.
    """
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

    A class without images is a grey row.

    Args:
        counts: Assignments of each class's images to each expert.
        tokens_per_class: Tokens of each class's images; the images themselves where they are routed as a whole.
        class_names: Names of the classes, in the order of the rows.
        path: The PNG to write.
        title: The heading.
        word: What the classes are called on the axes.
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
    """Draw how many images of each true class (rows) were predicted as each class (columns).

    Args:
        matrix: Counts of images.
        class_names: Names of the classes, in the order of the rows and the columns.
        path: The PNG to write.
    """
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
    """Draw what was logged of losses, accuracies, bits per byte and the learning rate against the optimizer step.

    Args:
        metrics_path: The run's `metrics.jsonl`.
        path: The PNG to write.
    """
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
