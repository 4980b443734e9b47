"""What ``gatewright report`` does: make the pictures and the page of a finished run anew."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gatewright.cli.flags import parse, refuse_unknown_flags
from gatewright.report import write_all
from gatewright.train import load_config
from gatewright.train.folder import CONFIG, resume_command


@dataclass(frozen=True)
class ReportArguments:
    """Make the pictures and the page of a finished run anew, from result.json and metrics.jsonl in its folder.

    Args:
        run: The run's folder.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]


def report_command(words: list[str]) -> None:
    """Write the report of a run, and name its files."""
    refuse_unknown_flags(words, [])
    arguments = parse(ReportArguments, words, prog="gatewright report")
    if not (arguments.run / "result.json").is_file():
        raise FileNotFoundError(
            f"{arguments.run} has no result.json, which a run writes when it ends. {_way_on(arguments.run)}"
        )
    for path in write_all(arguments.run):
        print(path)


def _way_on(run: Path) -> str:
    """Say how a run that is there comes to its end."""
    if not (run / CONFIG).is_file():
        return "Name the folder of a finished run."
    return f"Go on with: {resume_command(load_config(run / CONFIG), run)}"
