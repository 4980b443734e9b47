"""The command line that all benchmarks share."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar

import torch

from benchmarks.results import FOLDER

Item = TypeVar("Item")


def parser(program: str, description: str | None, seconds: float) -> argparse.ArgumentParser:
    """Return the flags of every benchmark; the seconds are those that one case is timed for."""
    made = argparse.ArgumentParser(prog=f"python -m {program}", description=description)
    made.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    made.add_argument("--case", type=int, nargs="*", help="numbers of cases, from 0; by default all")
    made.add_argument("--seconds", type=float, default=seconds, help="how long to time one case")
    made.add_argument("--quick", action="store_true", help="one tiny case, to see that everything runs")
    made.add_argument("--output", type=Path, default=FOLDER, help="folder of the JSON files")
    return made


def chosen(asked: argparse.Namespace, cases: Sequence[Item], quick: Item) -> list[Item]:
    """Return the cases asked for; a quick one is timed no longer than it must be."""
    if asked.quick:
        asked.seconds = 0.01
        return [quick]
    return list(cases) if asked.case is None else [cases[number] for number in asked.case]
