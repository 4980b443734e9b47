"""What ``gatewright train`` does: read settings from a recipe and flags, train, and say what came of it."""

import os
import shlex
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console

from gatewright.cli.evaluate import print_experts
from gatewright.cli.flags import flags_of, parse, refuse_unknown_flags, with_router
from gatewright.names import known
from gatewright.recipes import RECIPES, recipe_named, with_epochs
from gatewright.report import result_table, write_all
from gatewright.report.facts import class_names_of, item_of
from gatewright.train import RunConfig, launch, load_config, needs_launch, preview, program, train, was_restarted

SWITCHES = ("--resume", "--no-resume", "--dry-run", "--no-dry-run", "--report", "--no-report")
USAGE = """\
usage: gatewright train RECIPE [FLAG VALUE ...]

Every setting of a recipe is a flag, and gatewright train RECIPE --help lists them all with their values, such as
  --epochs 3 --seed 1 --output runs/mine     how long, which random numbers, and where to
  --model.num-experts 16 --model.top-k 1     the mixture
  --model.router top-k --model.router-options jitter 0.01
  --optim.lr 1e-3 --data.batch-size 64       the training
  --resume --output runs/mine                go on with a run that was stopped
  --dry-run                                  check everything, and print what would be trained
  --no-report                                leave out the pictures and the page; gatewright report makes them later

recipes: {}
gatewright list says what each of them is, and what the flags can choose.
"""


NEXT = {
    "classification": (
        ("evaluate {run} --flip", "with test-time augmentation"),
        ("predict {run} {file}", "classify a file, and see which experts it goes to"),
    ),
    "language_model": (
        ("generate {run} --prompt 'import '", "have it write on"),
        ("predict {run} {file}", "the bits per byte of any file"),
    ),
    "": (("evaluate {run}", "on the whole test set"), ("report {run}", "make its report anew")),
}
"""The commands to offer after a run of a task, and of any other task."""


@dataclass(frozen=True)
class TrainArguments:
    """Train a recipe. Every setting of the run is a flag.

    Args:
        run: The run's settings.
        resume: Go on with the run in --output from its newest checkpoint, with the settings that it has.
        dry_run: Check everything, print the settings and what would be trained, and train nothing.
        report: Draw the pictures and write the page when the run ends; gatewright report makes them at any later time.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    resume: bool = False
    dry_run: bool = False
    report: bool = True


def train_command(words: list[str]) -> None:
    """Train a recipe, then print its result, its experts and what to do next."""
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        raise ValueError(f"train needs a recipe: gatewright train RECIPE. Known: {', '.join(RECIPES)}.")
    if words[0].startswith("-"):
        print(USAGE.format(", ".join(RECIPES)), end="")
        return
    recipe = recipe_named(words[0])
    arguments = parse_train(recipe, words[1:])
    if arguments.dry_run:
        print(preview(arguments.run, resume=arguments.resume), end="")
        return
    if needs_launch(arguments.run):
        launch(arguments.run, words, resume=arguments.resume)
        return
    resume = arguments.resume or was_restarted(Path(arguments.run.output or ""))
    report = write_all if arguments.report else None
    result, output = train(arguments.run, resume=resume, recipe=recipe, report=report)
    if int(os.environ.get("RANK", 0)) > 0:
        return
    console = Console(markup=False)  # A name may hold brackets.
    print_experts(console, result["layers"], class_names_of(result), item_of(result))
    console.print(result_table(result))
    pictures = ", ".join(path.name for path in sorted(output.glob("*.png")))
    written = f": report.html, {pictures}" if report else ", without a report"
    console.print(f"\nThe run is in {output}{written}", highlight=False, soft_wrap=True)
    print(f"{result['tracking']}\n{_next_commands(arguments.run, output)}")


def parse_train(config: RunConfig, words: list[str]) -> TrainArguments:
    """Read the flags of train over a recipe's settings, or over those of the run that is resumed."""
    saved = Path(_value_of("--output", words) or "") / "config.yaml"
    if "--resume" in words and saved.is_file():
        resumed = load_config(saved)
        known(config.recipe, {resumed.recipe: None}, "recipe of this run")
        return _parse_run(resumed, words)
    epochs = _value_of("--epochs", words) or ""
    return _parse_run(with_epochs(config, int(epochs)) if epochs.isdecimal() and int(epochs) > 0 else config, words)


def _value_of(flag: str, words: list[str]) -> str | None:
    """Return the last value that is given to a flag."""
    joined = (word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}="))
    apart = (value for word, value in pairwise(words) if word == flag)
    return next(iter([*joined, *apart][::-1]), None)


def _parse_run(config: RunConfig, words: list[str]) -> TrainArguments:
    """Read flags over settings, of which the router's options and losses hold for that router alone."""
    refuse_unknown_flags(words, {*flags_of(config), *SWITCHES})
    prog = f"gatewright train {config.recipe}"
    asked = parse(TrainArguments, words, prog=prog, default=TrainArguments(config))
    return replace(asked, run=with_router(asked.run, config, words))


def _next_commands(config: RunConfig, output: Path) -> str:
    call, run = program(), shlex.quote(str(output))
    example = next(map(str, sorted((output / "examples").glob("*.*"))), "FILE")
    commands = {
        **{words.format(run=run, file=shlex.quote(example)): why for words, why in NEXT.get(config.task, NEXT[""])},
        f"train {config.recipe} --model.num-experts 16": "more experts",
        "list": "other recipes, CIFAR-10 among them",
    }
    return "\n".join(["Next:", *(f"  {call} {words}  # {why}" for words, why in commands.items())])
