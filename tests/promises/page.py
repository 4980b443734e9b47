"""The page: written from rows, and read back into them."""

import platform
import re
from dataclasses import fields
from pathlib import Path

import torch

from tests.promises.measure import Row
from tests.promises.places import TABLES

PAGE = Path(__file__).parents[2] / "docs" / "promises.md"
COLUMNS = (
    "float32 outputs",
    "float32 gradients",
    "float64 outputs",
    "float64 gradients",
    "alone, evaluation",
    "alone, training",
    "one graph",
    "checkpointing",
    "padding",
    "bfloat16",
)
TEXT = Path(__file__).with_name("page.md").read_text(encoding="utf-8")


def versions():
    """What the measurement ran on."""
    return f"torch {torch.__version__.split('+')[0]} and Python {platform.python_version()}"


def render(rows, versions):
    """The page of these rows."""
    parts = [TEXT.format(versions=versions)]
    for table, names in TABLES.items():
        parts.append(f"## {table}\n\n" + "\n".join([*head(), *(line(row, rows[table, row]) for row in names)]) + "\n")
    return "\n".join(parts)


def head():
    """The first two lines of a table."""
    return [f"| | {' | '.join(COLUMNS)} |", "|" + " --- |" * (len(COLUMNS) + 1)]


def line(name, row):
    """A row as a line of its table."""
    return f"| {name} | {' | '.join(written(getattr(row, field.name)) for field in fields(row))} |"


def written(value):
    """A figure to one digit, or yes or no."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.0e}".replace("e-0", "e-") if value else "0"


def parse(text):
    """The rows of a page by table and name, and the versions that it names."""
    rows = {}
    for section in text.split("\n## ")[2:]:
        table, *lines = section.strip().splitlines()
        for cells in (line.strip("| ").split(" | ") for line in lines[3:]):
            rows[table, cells[0]] = read(cells[1:])
    return rows, re.search(r"Measured with (.*), on CPU", text)[1]


def read(cells):
    """The row whose cells these are."""
    answers = {"yes": True, "no": False}
    kinds = [field.type for field in fields(Row)]
    return Row(*(answers[cell] if kind is bool else float(cell) for kind, cell in zip(kinds, cells, strict=True)))
