"""The common look of the pictures, and how they reach the disk.

Figures are made without pyplot: nothing global is touched, so they can be drawn in any thread.
"""

import io
import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from jaxtyping import Bool, Float
from torch import Tensor

from gatewright.atomic import atomic_write
from gatewright.extras import require

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# The colours of Okabe and Ito, which the colour-blind can tell apart, without their yellow, which white swallows.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#8a6d3b")
GREY = "#b8b8b8"
GRID = "#e4e4e4"
FONT = "DejaVu Sans"  # Comes with matplotlib.
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
    """Put the legend to the right, where it covers no line; none where no line has a name."""
    if axes.get_legend_handles_labels()[0]:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False, borderaxespad=0)


def legend_below(axes: "Axes", columns: int) -> None:
    """Put the legend under the axes, where a narrow page has room; none where no line has a name."""
    lines, names = axes.get_legend_handles_labels()
    if lines:
        axes.figure.legend(lines, names, loc="outside lower left", ncols=columns, fontsize=9, frameon=False)


def name_rows(axes: "Axes", class_names: Sequence[str]) -> None:
    """Write one class name beside each row."""
    size = 9 if len(class_names) <= MAX_ROOMY_CLASSES else 6
    names, fonts = legible(class_names)
    axes.set_yticks(range(len(names)), names, fontsize=size, fontfamily=fonts, parse_math=False)


def legible(names: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return class names as a picture can show them, and the fonts to show them in.

    Where matplotlib's own font lacks a script, installed fonts that have it are added. A name with a character that no
    font has becomes its position, as ``class 3``: a row of empty boxes would say less.
    """
    manager = require("matplotlib.font_manager", "train")
    fonts = [FONT]
    missing = set("".join(names)) - _characters(manager.findfont(FONT)) - {"\n"}
    for font in manager.fontManager.ttflist if missing else ():
        if not re.search("emoji|last ?resort", font.name, re.IGNORECASE) and missing & (has := _characters(font.fname)):
            fonts.append(font.name)
            missing -= has
    shown = [f"class {place}" if missing.intersection(name) else name for place, name in enumerate(names)]
    return shown, fonts


def _characters(path: str) -> set[str]:
    return set(map(chr, require("matplotlib.ft2font", "train").FT2Font(path).get_charmap()))


def draw_shares(
    axes: "Axes", percent: Float[Tensor, "classes columns"], texts: Sequence[Sequence[str]], colour_label: str
) -> None:
    """Draw percentages as coloured cells with a colour bar, and the texts in them where there is room.

    A row of NaN is a class without images, and says so.
    """
    rows, columns = percent.shape
    highest = max(float(percent.nan_to_num().max()), 1.0)
    image = axes.imshow(percent.numpy(), cmap=COLOUR_MAP, vmin=0, vmax=highest, aspect="auto", interpolation="nearest")
    axes.set_facecolor("#eeeeee")
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


def svg(figure: "Figure", description: str) -> str:
    """Return a figure as an element of an HTML page, whose colours are the page's own and so follow its dark mode.

    Letters are drawn as outlines, and nothing in it names an address.
    """
    file = io.StringIO()
    no_metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    figure.savefig(file, format="svg", transparent=True, metadata=no_metadata)
    drawing = re.search(r"<svg.*</svg>", file.getvalue(), re.DOTALL)
    assert drawing is not None
    text = re.sub(r"<metadata>.*?</metadata>", "", drawing[0], flags=re.DOTALL)
    start = f'<svg class="chart" role="img" aria-label="{escape(description)}" viewBox='
    text = re.sub(r"<svg [^>]*viewBox=", lambda _: start, text, count=1)
    text = re.sub(r' (xmlns(:\w+)?|version)="[^"]*"', "", text)
    return re.sub(r"#[0-9a-f]{6}\b", lambda colour: _themed(colour[0]), text)


def _themed(colour: str) -> str:
    """Return the page's name of a colour; black is whatever the page writes in."""
    if colour == "#000000":
        return "currentColor"
    if colour in COLOURS:
        return f"var(--line-{COLOURS.index(colour)})"
    return "var(--grid)" if colour in (GREY, GRID) else colour


def save(figure: "Figure", path: Path) -> Path:
    """Write a PNG that is either complete or absent."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(path) as partial:
        figure.savefig(partial, format="png")
    return path
