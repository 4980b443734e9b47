"""What each command does: read arguments, call the library, print."""

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from gatewright.cli.arguments import EvaluateArguments, TrainArguments
from gatewright.cli.completion import completion_command
from gatewright.cli.export import export_command
from gatewright.cli.flags import flags_of, parse, refuse_unknown_flags, with_options, without_options
from gatewright.cli.generate import generate_command
from gatewright.cli.listing import list_command
from gatewright.cli.plan import plan_command
from gatewright.cli.predict import predict_command
from gatewright.names import known
from gatewright.recipes import RECIPES, with_epochs
from gatewright.report import confusion_table, expert_table, result_table
from gatewright.report.facts import class_names_of
from gatewright.tasks import Classification, ClassificationEvaluation, check_same_images, mirrored_too
from gatewright.train import (
    RunConfig,
    evaluate,
    launch,
    load_config,
    load_run,
    needs_launch,
    preview,
    program,
    train,
    was_restarted,
)

SWITCHES = ("--resume", "--no-resume", "--dry-run", "--no-dry-run")
USAGE = """\
usage: gatewright train RECIPE [FLAG VALUE ...]

Every setting of a recipe is a flag, and gatewright train RECIPE --help lists them all with their values, such as
  --epochs 3 --seed 1 --output runs/mine     how long, which random numbers, and where to
  --model.num-experts 16 --model.top-k 1     the mixture
  --model.router top-k --model.router-options jitter 0.01
  --optim.lr 1e-3 --data.batch-size 64       the training
  --resume --output runs/mine                go on with a run that was stopped
  --dry-run                                  check everything, and print what would be trained

recipes: {}
gatewright list says what each of them is, and what the flags can choose.
"""


def train_command(words: list[str]) -> None:
    """Train a recipe, then print its result, its experts and what to do next."""
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        raise ValueError(f"train needs a recipe: gatewright train RECIPE. Known: {', '.join(RECIPES)}.")
    if words[0].startswith("-"):
        print(USAGE.format(", ".join(RECIPES)), end="")
        return
    recipe = known(words[0], RECIPES, "recipe")
    arguments = parse_train(RECIPES[recipe](), words[1:])
    if arguments.dry_run:
        print(preview(arguments.run, resume=arguments.resume), end="")
        return
    if needs_launch(arguments.run):
        launch(arguments.run, words, resume=arguments.resume)
        return
    resume = arguments.resume or was_restarted(Path(arguments.run.output or ""))
    result, output = train(arguments.run, resume=resume, recipe=RECIPES[recipe]())
    if int(os.environ.get("RANK", 0)) > 0:
        return
    console = Console(markup=False)  # A name may hold brackets.
    _print_experts(console, result)
    console.print(result_table(result))
    pictures = ", ".join(path.name for path in sorted(output.glob("*.png")))
    console.print(f"\nThe run is in {output}: report.html, {pictures}", highlight=False, soft_wrap=True)
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
    asked = parse(
        TrainArguments, words, prog=f"gatewright train {config.recipe}", default=TrainArguments(without_options(config))
    )
    return replace(asked, run=with_options(asked.run, config))


def evaluate_command(words: list[str]) -> None:
    """Print the figure that a run is judged by, its experts and its classes, on the whole test set."""
    refuse_unknown_flags(words, ["--flip", "--no-flip", "--data.path"])
    arguments = parse(EvaluateArguments, words, prog="gatewright evaluate")
    trained = load_run(arguments.run)
    of_images = isinstance(trained.task, Classification)
    if arguments.flip and not of_images:
        raise ValueError(f"--flip mirrors images; the run was trained on {trained.task.item}s. Leave it out.")
    data: Any = trained.config.data
    if arguments.data.path is not None:
        data = replace(data, path=arguments.data.path)
    part = trained.task.load(data, trained.config.model).test
    if of_images:
        check_same_images(trained.task.fingerprint(part), trained.fingerprint)
    found = evaluate(
        trained.task,
        trained.model,
        part,
        batch_size=data.eval_batch_size,
        precision=trained.config.precision,
        forward=mirrored_too if arguments.flip else nn.Module.__call__,
    )
    console = Console(markup=False)  # A name may hold brackets.
    for name, use in found.layers.items():
        tokens, classes = use.sums.tokens_per_expert.to(use.class_by_expert.dtype), trained.task.class_names(part)
        console.print(expert_table(name, tokens, use.class_by_expert, use.tokens_per_class, classes, trained.task.item))
    if isinstance(found, ClassificationEvaluation):
        _print_classes(console, found)
    print(f"test {' '.join(found.headline)} of {trained.task.size(part):,} {trained.task.item}s")


def _print_classes(console: Console, found: ClassificationEvaluation) -> None:
    table = Table("class", "accuracy")
    for name, accuracy in zip(found.class_names, found.accuracy_per_class.tolist(), strict=True):
        table.add_row(name, f"{accuracy:.2%}")
    console.print(table)
    console.print(confusion_table(found.confusion, found.class_names))


def _print_experts(console: Console, result: dict[str, Any]) -> None:
    class_names = tuple(class_names_of(result))
    for name, layer in result["layers"].items():
        keys = ("tokens_per_expert", "class_by_expert", "tokens_per_class")
        load, seen, tokens = (torch.tensor(layer[key]) for key in keys)
        console.print(expert_table(name, load, seen, tokens, class_names, result["item"]))


def _next_commands(config: RunConfig, output: Path) -> str:
    call, run = program(), shlex.quote(str(output))
    of_text = config.task == "language_model"
    example = next(map(str, sorted((output / "examples").glob("*.*"))), "FILE.txt" if of_text else "IMAGE.png")
    commands = {
        f"evaluate {run} --flip": "with test-time augmentation",
        f"predict {run} {shlex.quote(example)}": "classify a file, and see which experts it goes to",
    }
    if of_text:
        commands = {
            f"generate {run} --prompt 'import '": "have it write on",
            f"predict {run} {shlex.quote(example)}": "the bits per byte of any file",
        }
    commands |= {
        f"train {config.recipe} --model.num-experts 16": "more experts",
        "list": "other recipes, CIFAR-10 among them",
    }
    return "\n".join(["Next:", *(f"  {call} {words}  # {why}" for words, why in commands.items())])


COMMANDS: Mapping[str, Callable[[list[str]], int | None]] = MappingProxyType(
    {
        "completion": completion_command,
        "evaluate": evaluate_command,
        "export": export_command,
        "generate": generate_command,
        "list": list_command,
        "plan": plan_command,
        "predict": predict_command,
        "train": train_command,
    }
)
"""Every command by name; one may return an exit status, and None is 0."""
