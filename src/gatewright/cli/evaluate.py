"""What ``gatewright evaluate`` does: print what a trained model makes of the whole test set."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from rich.console import Console
from torch import nn

from gatewright.cli.flags import parse, refuse_unknown_flags
from gatewright.report import expert_table, plain_table
from gatewright.tasks import Forward
from gatewright.train import RunConfig, Trained, evaluate, load_run
from gatewright.train.result import describe_layer


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate a run on the whole test set.

    Args:
        run: The run's folder.
        flip: Average each image with its mirror image.
        path: Folder of the data; by default where they were in training.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    flip: bool = False
    path: Annotated[str | None, tyro.conf.arg(name="data.path")] = None


def evaluate_command(words: list[str]) -> None:
    """Print the experts of a run, what its task shows of the whole test set, and the figure that it is judged by."""
    refuse_unknown_flags(words, ["--flip", "--no-flip", "--data.path"])
    arguments = parse(EvaluateArguments, words, prog="gatewright evaluate")
    trained = load_run(arguments.run)
    task, data, forward = trained.task, data_at(trained.config, arguments.path), _forward(trained, flip=arguments.flip)
    part = task.load(data, trained.config.model).test
    task.check_fit(task.fingerprint(part), trained.fingerprint)
    found = evaluate(
        task,
        trained.model,
        part,
        batch_size=trained.config.data.eval_batch_size,
        precision=trained.config.precision,
        forward=forward,
    )
    console = Console(markup=False)  # A name may hold brackets.
    layers = {name: describe_layer(use) for name, use in found.layers.items()}
    print_experts(console, layers, task.class_names(part), task.item)
    for table in found.tables():
        console.print(plain_table(table.title, table.columns, table.rows))
    print(f"test {' '.join(found.headline)} of {task.size(part):,} {task.item}s")


def print_experts(
    console: Console, layers: Mapping[str, Mapping[str, Any]], class_names: Sequence[str], item: str
) -> None:
    """Print a table of each layer's experts, from what `result.json` says of the layers."""
    for name, layer in layers.items():
        keys = ("tokens_per_expert", "class_by_expert", "tokens_per_class")
        load, seen, tokens = (torch.tensor(layer[key]) for key in keys)
        console.print(expert_table(name, load, seen, tokens, class_names, item))


def data_at(config: RunConfig, path: str | None) -> Any:
    """Return the settings of the data, which may be at another place by now."""
    data: Any = config.data
    if path is None:
        return data
    if not hasattr(data, "path"):
        raise ValueError(f"data.path is given, and {type(data).__name__} has no path: leave it out; got {path}.")
    return replace(data, path=path)


def _forward(trained: Trained, *, flip: bool) -> Forward:
    if not flip:
        return nn.Module.__call__
    if "flip" not in trained.task.views:
        raise ValueError(f"--flip mirrors images, and the run at hand is one of {trained.task.item}s: leave it out.")
    return trained.task.views["flip"]
