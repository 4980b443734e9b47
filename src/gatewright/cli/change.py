"""What ``gatewright prune``, ``merge``, ``grow`` and ``densify`` do: change the experts of a finished run."""

import shlex
from collections.abc import Iterator, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated

import tyro
from pydantic import PositiveInt
from rich.console import Console

from gatewright.cli.evaluate import data_at
from gatewright.cli.flags import parse, refuse_unknown_flags
from gatewright.report import plain_table
from gatewright.settings import settings
from gatewright.train import load_config, program
from gatewright.train.change import Change, change_run
from gatewright.train.folder import CONFIG
from gatewright.train.operations import Densify, Grow, Merge, Operation, Prune


@settings()
class ChangeArguments:
    """Change the experts of a finished run, and keep the result as a new run.

    Args:
        run: The folder of the finished run, which stays as it is.
        output: The folder of the new run; by default that of the run with the command's name behind it.
        path: Folder of the data; by default where they were in training.
        batches: Number of batches of training data that experts are measured on.
        test: Measure the quality on the test set too, and not on the held-out part alone.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    output: Path | None = None
    path: Annotated[str | None, tyro.conf.arg(name="data.path")] = None
    batches: PositiveInt = 8
    test: bool = False


@settings()
class PruneArguments(Prune, ChangeArguments):
    """Leave experts out of every mixture of a finished run, and keep the rest as a new run."""


@settings()
class MergeArguments(Merge, ChangeArguments):
    """Merge the most alike experts of every mixture of a finished run, and keep the result as a new run."""


@settings()
class GrowArguments(Grow, ChangeArguments):
    """Give every mixture of a finished run more experts, copies of its own, and keep the result as a new run."""


@settings()
class DensifyArguments(Densify, ChangeArguments):
    """Put the mean of its experts in place of every mixture of a finished run, and keep the result as a new run."""


CHANGES: Mapping[str, tuple[type[Operation], type[ChangeArguments]]] = {
    "prune": (Prune, PruneArguments),
    "merge": (Merge, MergeArguments),
    "grow": (Grow, GrowArguments),
    "densify": (Densify, DensifyArguments),
}
"""The operation of each command, and its flags together with those of all four."""


def change_command(name: str, words: list[str]) -> None:
    """Change a run, and print what became of its experts, its quality and its size, and what to do next."""
    kind, flags = CHANGES[name]
    refuse_unknown_flags(words, change_flags(flags))
    arguments = parse(flags, words, prog=f"gatewright {name}")
    operation = kind(**{each.name: getattr(arguments, each.name) for each in fields(kind)})
    run, output = arguments.run, arguments.output or Path(f"{arguments.run}-{name}")
    data = None if arguments.path is None else data_at(load_config(run / CONFIG), arguments.path)
    change = change_run(run, operation, output, data=data, batches=arguments.batches, test=arguments.test)
    for layer, what in change.said.items():
        print(f"{layer}: {what}")
    Console(markup=False).print(plain_table("", ("", "before", f"after {name}"), list(_rows(change))))
    print(f"The new run is in {output}.\n{_next_commands(change)}")


def change_flags(arguments: type[ChangeArguments]) -> set[str]:
    """Name the flags of a command that changes a run."""
    names = {each.name.replace("_", "-") for each in fields(arguments)} - {"run", "path"}
    return {"--data.path", "--no-test", *(f"--{name}" for name in names)}


def _rows(change: Change) -> Iterator[tuple[str, ...]]:
    for part, (before, after) in change.figures.items():
        figure = " ".join(before.split()[:-1])
        yield f"{part} {figure}", before.split()[-1], after.split()[-1]
    yield "parameters", *(f"{number:,}" for number in change.parameters)
    yield "seconds of the operation", "", f"{change.seconds:.3f}"


def _next_commands(change: Change) -> str:
    call, config, run = program(), change.config, shlex.quote(str(change.config.output))
    commands = {
        f"evaluate {run}": "on the whole test set",
        f"train {config.recipe} --output {run} --resume": "its result and its report, without further training",
        f"train {config.recipe} --output {run} --resume --epochs {config.epochs + 1}": "train it for one more epoch",
    }
    return "\n".join(["Next:", *(f"  {call} {words}  # {why}" for words, why in commands.items())])
