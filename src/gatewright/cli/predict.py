"""What ``gatewright predict`` does: say what a model makes of files, and name the experts that saw them."""

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from torch import nn

from gatewright.cli.flags import parse, refuse_unknown_flags
from gatewright.layers.base import moe_layers
from gatewright.routing import Routing
from gatewright.tasks import Task
from gatewright.train import Trained, load_run


@dataclass(frozen=True)
class PredictArguments:
    """Say what a trained model makes of files, such as the classes of images, and name the experts that saw them.

    Args:
        run: The run's folder.
        files: Files, and folders of them; sub-folders are searched too.
        top: Number of likeliest classes to name.
        json: Print one JSON object per file, each on a line of its own.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE")]
    top: int = 3
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False


def predict_command(words: list[str]) -> int:
    """Print what the model makes of each file and the experts that it went to, and name the files that it cannot read.

    Returns:
        The exit status: 2 if a file could not be read, though all others were answered.
    """
    refuse_unknown_flags(words, ["--top", "--json"])
    arguments = parse(PredictArguments, words, prog="gatewright predict")
    if not arguments.files:
        raise ValueError("predict needs at least one file or folder: gatewright predict RUN FILE.")
    if arguments.top < 1:
        raise ValueError(f"--top is the number of classes to name, 1 or more; got {arguments.top}.")
    trained = load_run(arguments.run)
    files = _files(trained.task, arguments.files)
    answered = [_answer(trained, file, arguments) for file in files]
    return 0 if all(answered) else 2


@torch.inference_mode()
def _answer(trained: Trained, file: Path, arguments: PredictArguments) -> bool:
    """Print what the model makes of a file, or why it cannot be read; tell whether it could."""
    try:
        found = trained.task.predict(trained.model, file, trained.fingerprint, top=arguments.top)
    except (ValueError, OSError) as error:
        said = f"{file}: {error.strerror}." if isinstance(error, OSError) and error.strerror else error
        print(f"error: {said}", file=sys.stderr)
        return False
    experts = experts_asked(trained.model)
    if arguments.json:
        print(json.dumps({"file": str(file), **found, "experts": experts}, ensure_ascii=False), flush=True)
    else:
        print(f"{file}: {'; '.join([trained.task.sentence(found), *_sentences(experts)])}", flush=True)
    return True


def experts_asked(model: nn.Module) -> dict[str, list[dict[str, Any]]]:
    """List by layer the experts that the last forward's tokens went to."""
    layers = [(name, layer.routing) for name, layer in moe_layers(model)]
    return {name: expert_weights(routing) for name, routing in layers if routing is not None}


def expert_weights(routing: Routing) -> list[dict[str, Any]]:
    """List the experts that tokens went to, with the weight of each: the mean over all tokens."""
    sums = routing.weight.new_zeros(routing.num_experts + 1).index_add(0, routing.expert_index, routing.weight)
    means = sums / routing.sums.num_tokens
    chosen = sorted({*routing.expert_index.tolist()} - {routing.num_experts})
    return [{"expert": index, "weight": float(means[index])} for index in chosen]


def _files(task: Task, paths: tuple[Path, ...]) -> list[Path]:
    """Put the files of a folder in its place."""
    found = {path: task.find_files(path) if path.is_dir() else [path] for path in paths}
    for path, files in found.items():
        if not files:
            raise FileNotFoundError(f"there is no {task.item} file in the folder {path}: name another")
    return [file for path in paths for file in found[path]]


def _sentences(experts: dict[str, list[dict[str, Any]]]) -> Iterator[str]:
    for name, weights in experts.items():
        yield f"{name} experts " + ", ".join(f"{each['expert']} {each['weight']:.1%}" for each in weights)
