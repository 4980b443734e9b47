"""Pieces of HTML: bars, tables, and tables whose cells are coloured by a share."""

import math
from collections.abc import Iterable, Sequence
from html import escape

# With more columns than this the cells of a coloured table are narrow and their numbers are left out.
MAX_WORDED_COLUMNS = 16
# From this share on a cell is coloured enough for letters of the other brightness, in light and in dark.
DARK = 0.7


def bar(text: str, share: float, highest: float) -> str:
    """Return a share in words and as a bar, whose full length is the highest share."""
    length = f"width: {100 * share / highest:.1f}%"
    return f'<span class="number">{escape(text)}</span><span class="bar"><span style="{length}"></span></span>'


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of cells that are HTML already; the last column may wrap."""
    head = "".join(f"<th>{escape(heading)}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return (
        f'<div class="scroll"><table class="rows"><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'
    )


def pairs(items: Iterable[tuple[str, object]]) -> str:
    """Return labels and values, one pair a row."""
    rows = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>\n" for key, value in items)
    return f'<table class="pairs">{rows}</table>'


def heat_table(
    corner: str,
    row_names: Sequence[str],
    column_names: Sequence[str],
    shares: Sequence[Sequence[float]],
    texts: Sequence[Sequence[str]],
) -> str:
    """Return a table whose cells are coloured by a share in [0, 1] and say a text; a share of NaN has no colour.

    Args:
        corner: What the rows and the columns are.
        row_names: One name per row.
        column_names: One name per column.
        shares: A row of shares per row.
        texts: What the cells say, left out where there are many columns.
    """
    wide = len(column_names) > MAX_WORDED_COLUMNS
    head = "".join(f"<th><span>{escape(name)}</span></th>" for name in column_names)
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(map(_cell, row, [''] * len(row) if wide else words))}</tr>\n"
        for name, row, words in zip(row_names, shares, texts, strict=True)
    )
    long = max(map(len, column_names)) > 3
    classes = " ".join(["heat", *(["narrow"] if wide else []), *(["long"] if long else [])])
    return (
        f'<div class="scroll"><table class="{classes}"><thead><tr><th>{escape(corner)}</th>{head}</tr></thead>\n'
        f"<tbody>{body}</tbody></table></div>"
    )


def _cell(share: float, text: str) -> str:
    if math.isnan(share):
        return '<td class="none">–</td>'
    dark = ' class="dark"' if share >= DARK else ""
    return f'<td{dark} style="--share: {100 * share:.0f}%">{escape(text)}</td>'
