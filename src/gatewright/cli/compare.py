"""What ``gatewright compare`` does: two groups of runs side by side, such as a mixture and its dense twin."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from gatewright.cli.flags import parse, refuse_unknown_flags
from gatewright.report import Comparison, comparison_table, plot_comparison


@dataclass(frozen=True)
class CompareArguments:
    """Compare runs with others of the same seeds: in the end, at equal operations, and at equal time.

    Args:
        runs: Folders of finished runs.
        to: Folders of the runs to compare them with, of the same seeds.
        picture: File for a picture of both groups' held-out figures over time and over operations.
    """

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
    to: Annotated[tuple[Path, ...], tyro.conf.arg(metavar="RUN [RUN ...]")]
    picture: Path = Path("comparison.png")


def compare_command(words: list[str]) -> None:
    """Print the comparison, and draw it."""
    refuse_unknown_flags(words, ["--to", "--picture"])
    arguments = parse(CompareArguments, words, prog="gatewright compare")
    if not (arguments.runs and arguments.to):
        raise ValueError("compare takes two groups of runs: gatewright compare RUN ... --to RUN ...")
    comparison = Comparison.read(arguments.runs, arguments.to)
    console = Console(markup=False)
    console.print(comparison_table(comparison))
    for note in comparison.notes():
        console.print(note, highlight=False)
    print(plot_comparison(comparison, arguments.picture))
