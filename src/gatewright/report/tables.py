"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxtyping import Int, Real
from torch import Tensor

from gatewright.extras import require
from gatewright.report.comparison import Comparison, spread
from gatewright.report.facts import LOAD, expert_facts, favourites_heading, result_facts

if TYPE_CHECKING:
    from rich.table import Table

BAR_WIDTH = 16


def expert_table(
    name: str,
    tokens_per_expert: Real[Tensor, " experts"],
    class_by_expert: Real[Tensor, "classes experts"] | None,
    tokens_per_class: Int[Tensor, " classes"] | None,
    class_names: Sequence[str],
    item: str = "image",
) -> "Table":
    """Return a row per expert: its share of the load, and its favourite classes. It takes what `expert_facts` does."""
    text = require("rich.text", "train").Text
    table: Table = require("rich.table", "train").Table(
        title=text(f"Experts of {name}, by the test {item}s"), title_justify="left"
    )
    table.add_column("expert", justify="right")
    table.add_column(LOAD)
    table.add_column(favourites_heading(item))
    facts = expert_facts(tokens_per_expert, class_by_expert, tokens_per_class, class_names)
    highest = max(expert.share for expert in facts) or 1
    for expert in facts:
        bar = "█" * round(BAR_WIDTH * expert.share / highest)
        share = text.assemble(f"{expert.share_text:>6} ", (bar, "blue"))
        favourites = text("dead", style="bold red") if expert.dead else text(expert.favourites_text)
        table.add_row(str(expert.index), share, favourites)
    return table


def plain_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> "Table":
    """Return a table of a task: names and classes on the left, numbers on the right."""
    text = require("rich.text", "train").Text
    table: Table = require("rich.table", "train").Table(title=text(title) if title else None)
    for place, name in enumerate(columns):
        table.add_column(text(name), justify="right" if place else "left")
    for row in rows:
        table.add_row(*map(text, row))
    return table


def result_table(result: Mapping[str, Any]) -> "Table":
    """Return the run's result, the content of its `result.json`, in a few lines."""
    text = require("rich.text", "train").Text
    table: Table = require("rich.table", "train").Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for label, value in result_facts(result):
        table.add_row(text(label), text(value))
    return table


def comparison_table(comparison: Comparison) -> "Table":
    """Return a row per figure: both groups' means with standard deviations, how they differ, and how surely."""
    names = [", ".join(sorted({run.name for run in group})) for group in (comparison.runs, comparison.others)]
    columns = [comparison.title, *names, "difference or ratio", "p"]
    rows = [(row.name, spread(row.values), spread(row.others), row.difference, row.p_text) for row in comparison.rows()]
    return plain_table("", columns, rows)
