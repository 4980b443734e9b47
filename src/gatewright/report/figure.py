"""The common look of the pictures, and how they reach the disk.

Figures are made without pyplot: nothing global is touched, so they can be drawn in any thread.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

from gatewright.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which the colour-blind can tell apart, without their yellow, which white swallows.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8A6D3B")
GREY = "#B8B8B8"
COLOUR_MAP = "Blues"
DOTS_PER_INCH = 150
# Above these a class name is set in small print, and the number in a cell is left out.
MAX_ROOMY_CLASSES = 24
MAX_ANNOTATED_COLUMNS = 16


def new_figure(width: float, height: float) -> "Figure":
    """Return an empty figure of a size in inches."""
    figure: Figure = require("matplotlib.figure", "train").Figure((width, height), DOTS_PER_INCH, layout="constrained")
    return figure


def label(axes: "Axes", *, title: str = "", x: str = "", y: str = "") -> None:
    """Write the heading and what the axes show, and take away the frame's needless half."""
    axes.set_title(title, fontsize=12, loc="left", fontweight="bold", parse_math=False)
    axes.set_xlabel(x, fontsize=10)
    axes.set_ylabel(y, fontsize=10)
    axes.tick_params(labelsize=9)
    axes.spines[["top", "right"]].set_visible(False)


def legend_beside(axes: "Axes") -> None:
    """Put the legend to the right, where it covers no line."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False, borderaxespad=0)


def name_rows(axes: "Axes", class_names: Sequence[str]) -> None:
    """Write one class name beside each row."""
    size = 9 if len(class_names) <= MAX_ROOMY_CLASSES else 6
    axes.set_yticks(range(len(class_names)), class_names, fontsize=size, parse_math=False)


def draw_shares(
    axes: "Axes", percent: Float[Tensor, "classes columns"], texts: Sequence[Sequence[str]], colour_label: str
) -> None:
    """Draw percentages as coloured cells with a colour bar, and the texts in them where there is room.

    A row of NaN is a class without images, and says so.
    """
    rows, columns = percent.shape
    highest = max(float(percent.nan_to_num().max()), 1.0)
    image = axes.imshow(percent.numpy(), cmap=COLOUR_MAP, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
    axes.set_facecolor("#EEEEEE")
    bar = axes.figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02, aspect=40)
    bar.set_label(colour_label, fontsize=9)
    bar.ax.tick_params(labelsize=8)
    roomy = rows <= MAX_ROOMY_CLASSES and columns <= MAX_ANNOTATED_COLUMNS
    for row in range(rows):
        if percent[row].isnan().any():
            axes.text((columns - 1) / 2, row, "no images", ha="center", va="center", fontsize=8 if roomy else 5)
        elif roomy:
            _write_row(axes, row, texts[row], percent[row] > 0.6 * highest)


def _write_row(axes: "Axes", row: int, texts: Sequence[str], dark_mask: Bool[Tensor, " columns"]) -> None:
    for column, (text, dark) in enumerate(zip(texts, dark_mask.tolist(), strict=True)):
        axes.text(column, row, text, ha="center", va="center", fontsize=8, color="white" if dark else "black")


def save(figure: "Figure", path: Path) -> Path:
    """Write a PNG that is either complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    figure.savefig(partial, format="png")
    partial.replace(path)
    return path
