"""What each command does: read arguments, call the library, print."""

import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from rich.table import Table

from gatewright.cli.export import export_command
from gatewright.cli.flags import flags_of, refuse_unknown_flags, with_options, without_options
from gatewright.cli.plan import plan_command
from gatewright.data import BUILT_IN_NAMES, decode_image, load_images
from gatewright.dispatch import DISPATCHERS
from gatewright.experts import EXPERTS
from gatewright.losses import LOSSES
from gatewright.names import known
from gatewright.recipes import RECIPES
from gatewright.report import confusion_table, expert_table, result_table
from gatewright.routed import moe_layers
from gatewright.routers import ROUTERS
from gatewright.routing import Routing, SoftRouting
from gatewright.train import (
    RunConfig,
    Trained,
    check_same_images,
    evaluate,
    launch,
    load_config,
    load_run,
    needs_launch,
    program,
    train,
    was_restarted,
)


@dataclass(frozen=True)
class TrainArguments:
    """Train a recipe. Every setting of the run is a flag.

    Args:
        run: The run's settings.
        resume: Go on with the run in --output from its newest checkpoint, with the settings that it has.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    resume: bool = False


@dataclass(frozen=True)
class DataPath:
    """Where the data of a run are now.

    Args:
        path: Folder of the data; by default where they were in training.
    """

    path: str | None = None


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate a run on the whole test set.

    Args:
        run: The run's folder.
        flip: Average each image with its mirror image.
        data: Where the data are.
    """

    run: tyro.conf.Positional[Path]
    data: DataPath
    flip: bool = False


@dataclass(frozen=True)
class PredictArguments:
    """Classify image files, and name the experts that saw them.

    Args:
        run: The run's folder.
        images: Image files.
    """

    run: tyro.conf.Positional[Path]
    images: tyro.conf.Positional[tuple[Path, ...]]


def train_command(words: list[str]) -> None:
    """Train a recipe, then print its result, its experts and what to do next."""
    if not words or (words[0].startswith("-") and words[0] not in ("-h", "--help")):
        raise ValueError(f"train needs a recipe: gatewright train RECIPE. Known: {', '.join(RECIPES)}.")
    if words[0].startswith("-"):
        print(f"usage: gatewright train RECIPE [--help]\nrecipes: {', '.join(RECIPES)}")
        return
    recipe = known(words[0], RECIPES, "recipe")
    arguments = parse_train(RECIPES[recipe](), words[1:])
    if needs_launch(arguments.run):
        launch(arguments.run, words, resume=arguments.resume)
        return
    resume = arguments.resume or was_restarted(Path(arguments.run.output or ""))
    result, output = train(arguments.run, resume=resume)
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
    return _parse_run(config, words)


def _value_of(flag: str, words: list[str]) -> str | None:
    """Return the last value that is given to a flag."""
    joined = (word.removeprefix(f"{flag}=") for word in words if word.startswith(f"{flag}="))
    apart = (value for word, value in pairwise(words) if word == flag)
    return next(iter([*joined, *apart][::-1]), None)


def _parse_run(config: RunConfig, words: list[str]) -> TrainArguments:
    """Read flags over settings, of which the router's options and losses hold for that router alone."""
    refuse_unknown_flags(words, {*flags_of(config), "--resume", "--no-resume"})
    asked: TrainArguments = tyro.cli(
        TrainArguments,
        prog=f"gatewright train {config.recipe}",
        args=words,
        default=TrainArguments(without_options(config)),
        config=(tyro.conf.AvoidSubcommands,),
    )
    return replace(asked, run=with_options(asked.run, config))


def evaluate_command(words: list[str]) -> None:
    """Print accuracy, accuracy per class and the experts of a run, on the whole test set."""
    refuse_unknown_flags(words, ["--flip", "--no-flip", "--data.path"])
    arguments = tyro.cli(EvaluateArguments, prog="gatewright evaluate", args=words)
    trained = load_run(arguments.run)
    data = (
        trained.config.data if arguments.data.path is None else replace(trained.config.data, path=arguments.data.path)
    )
    images = load_images(data).test
    check_same_images(images, trained.class_names, trained.image_shape)
    found = evaluate(
        trained.model,
        images,
        batch_size=data.eval_batch_size,
        precision=trained.config.precision,
        flip=arguments.flip,
    )
    console = Console(markup=False)  # A name may hold brackets.
    for name, use in found.layers.items():
        tokens = use.sums.tokens_per_expert.to(use.class_by_expert.dtype)
        console.print(expert_table(name, tokens, use.class_by_expert, use.tokens_per_class, trained.class_names))
    table = Table("class", "accuracy")
    for name, accuracy in zip(trained.class_names, found.accuracy_per_class.tolist(), strict=True):
        table.add_row(name, f"{accuracy:.2%}")
    console.print(table)
    console.print(confusion_table(found.confusion, trained.class_names))
    print(f"test accuracy {found.accuracy:.2%} of {int(found.confusion.sum())} images")


def predict_command(words: list[str]) -> None:
    """Print each image's three likeliest classes, and the experts that it went to."""
    arguments = tyro.cli(PredictArguments, prog="gatewright predict", args=words)
    if not arguments.images:
        raise ValueError("predict needs at least one image file: gatewright predict RUN IMAGE.")
    trained = load_run(arguments.run)
    channels, *size = trained.image_shape
    for path in arguments.images:
        image = decode_image(path, channels=channels, size=(size[0], size[1]))
        print(f"{path}: {_prediction(trained, image[None] / 255)}")


@torch.inference_mode()
def _prediction(trained: Trained, images: torch.Tensor) -> str:
    top = trained.model(images)[0].float().softmax(-1).topk(min(3, len(trained.class_names)))
    classes = (
        f"{trained.class_names[i]} {p:.1%}" for p, i in zip(top.values.tolist(), top.indices.tolist(), strict=True)
    )
    experts = (
        f"{name} experts {', '.join(_chosen(layer.routing))}"
        for name, layer in moe_layers(trained.model)
        if layer.routing is not None
    )
    return "; ".join([", ".join(classes), *experts])


def _chosen(routing: Routing | SoftRouting) -> list[str]:
    """Name the experts that an image went to; where it went to all of them, with their shares."""
    if isinstance(routing, Routing):
        return [str(index) for index in routing.expert_index.tolist()]
    return [f"{index} {share:.1%}" for index, share in enumerate(routing.weight.mean(0).tolist())]


def list_command(words: list[str]) -> None:
    """Print what there is to choose from."""
    if words:
        raise ValueError(f"list takes no arguments; got {' '.join(words)}.")
    table = Table("recipe", "what it is")
    for name, recipe in RECIPES.items():
        table.add_row(name, (recipe.__doc__ or "").partition("\n")[0])
    Console().print(table)
    print(f"data sets   {', '.join(BUILT_IN_NAMES)}, or any image data set of the Hugging Face hub as owner/name")
    for title, names in (("routers", ROUTERS), ("experts", EXPERTS), ("dispatch", DISPATCHERS), ("losses", LOSSES)):
        print(f"{title:<12}{', '.join(names)}")


def _print_experts(console: Console, result: dict[str, Any]) -> None:
    class_names = tuple(result["test_accuracy_per_class"])
    for name, layer in result["layers"].items():
        keys = ("tokens_per_expert", "class_by_expert", "tokens_per_class")
        load, seen, tokens = (torch.tensor(layer[key]) for key in keys)
        console.print(expert_table(name, load, seen, tokens, class_names))


def _next_commands(config: RunConfig, output: Path) -> str:
    call, run = program(), shlex.quote(str(output))
    commands = {
        f"evaluate {run} --flip": "with test-time augmentation",
        f"predict {run} IMAGE.png": "classify a file, and see which experts it goes to",
        f"train {config.recipe} --model.num-experts 16": "more experts",
        "list": "other recipes, CIFAR-10 among them",
    }
    return "\n".join(["Next:", *(f"  {call} {words}  # {why}" for words, why in commands.items())])


COMMANDS: Mapping[str, Callable[[list[str]], None]] = MappingProxyType(
    {
        "evaluate": evaluate_command,
        "export": export_command,
        "list": list_command,
        "plan": plan_command,
        "predict": predict_command,
        "train": train_command,
    }
)
"""Every command by name."""
