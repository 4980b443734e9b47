"""What ``gatewright predict`` does: classify images and name their experts, or say how well texts are predicted."""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from jaxtyping import UInt8
from torch import Tensor

from gatewright.cli.arguments import PredictArguments
from gatewright.cli.flags import parse, refuse_unknown_flags
from gatewright.data import TextSet, as_floats, decode_image, files_below, find_images
from gatewright.layers.base import moe_layers
from gatewright.routing import Routing
from gatewright.tasks import LanguageModel
from gatewright.train import Trained, evaluate, load_run


def predict_command(words: list[str]) -> int:
    """Print what the run's model makes of each file, and name the files that cannot be read.

    Of an image that is its likeliest classes and the experts that it went to; of a text, the bits per byte.

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
    of_text = isinstance(trained.task, LanguageModel)
    files = _text_files(arguments.files) if of_text else _image_files(arguments.files)
    answered = [(_answer_text if of_text else _answer)(trained, file, arguments) for file in files]
    return 0 if all(answered) else 2


def _answer(trained: Trained, file: Path, arguments: PredictArguments) -> bool:
    """Print what the model makes of a file, or why it cannot be read; tell whether it could."""
    channels, height, width = trained.fingerprint["image_shape"]
    try:
        image = decode_image(file, channels=channels, size=(height, width))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return False
    found = {"file": str(file), **prediction(trained, image, arguments.top)}
    print(json.dumps(found, ensure_ascii=False) if arguments.json else _sentence(found), flush=True)
    return True


def _answer_text(trained: Trained, file: Path, arguments: PredictArguments) -> bool:
    """Print how well the model predicts a file, or why it cannot be read; tell whether it could."""
    try:
        text = TextSet.pack([file.read_bytes()], trained.fingerprint["context"])
    except OSError as error:
        print(f"error: {file}: {error.strerror}.", file=sys.stderr)
        return False
    batch_size, precision = trained.config.data.eval_batch_size, trained.config.precision
    found = evaluate(trained.task, trained.model, text, batch_size=batch_size, precision=precision)
    said = {"file": str(file), "bits_per_byte": found.metrics["bits_per_byte"], "bytes": len(text)}
    line = f"{file}: {' '.join(reversed(found.headline))}, {len(text):,} bytes"
    print(json.dumps(said, ensure_ascii=False) if arguments.json else line, flush=True)
    return True


@torch.inference_mode()
def prediction(trained: Trained, image: UInt8[Tensor, "channels height width"], num_classes: int) -> dict[str, Any]:
    """Return the likeliest classes of one image, and per MoE layer the experts that it went to with their weights."""
    probs = trained.model(as_floats(image[None]))[0].float().softmax(-1)
    class_names = trained.fingerprint["class_names"]
    top = probs.topk(min(num_classes, len(class_names)))
    classes = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    layers = ((name, layer.routing) for name, layer in moe_layers(trained.model) if layer.routing is not None)
    return {
        "classes": [{"class": class_names[index], "probability": share} for index, share in classes],
        "experts": {name: expert_weights(routing) for name, routing in layers},
    }


def expert_weights(routing: Routing) -> list[dict[str, Any]]:
    """List the experts that tokens went to, with the weight of each: the mean over all tokens."""
    sums = routing.weight.new_zeros(routing.num_experts + 1).index_add(0, routing.expert_index, routing.weight)
    means = sums / routing.sums.num_tokens
    chosen = sorted({*routing.expert_index.tolist()} - {routing.num_experts})
    return [{"expert": index, "weight": float(means[index])} for index in chosen]


def _image_files(paths: tuple[Path, ...]) -> list[Path]:
    """Put the images of a folder in its place.

    Raises:
        FileNotFoundError: If a folder has none.
    """
    found = {path: find_images(path) if path.is_dir() else [path] for path in paths}
    for path, files in found.items():
        if not files:
            raise FileNotFoundError(f"there is no image file in the folder {path}: name another")
    return [file for path in paths for file in found[path]]


def _text_files(paths: tuple[Path, ...]) -> list[Path]:
    """Put the files of a folder in its place."""
    return [file for path in paths for file in (files_below(path) if path.is_dir() else [path])]


def _sentence(found: dict[str, Any]) -> str:
    parts = [", ".join(f"{each['class']} {each['probability']:.1%}" for each in found["classes"])]
    for name, weights in found["experts"].items():
        parts.append(f"{name} experts " + ", ".join(f"{each['expert']} {each['weight']:.1%}" for each in weights))
    return f"{found['file']}: {'; '.join(parts)}"
