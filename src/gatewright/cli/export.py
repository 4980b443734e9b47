"""What ``gatewright export`` does: the evaluated model's weights, in one file that any program reads."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gatewright.cli.flags import parse
from gatewright.extras import require
from gatewright.train import Trained, load_run


@dataclass(frozen=True)
class ExportArguments:
    """Write the weights of a run's evaluated model into one safetensors file.

    Args:
        run: The run's folder.
        file: The file to write.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    file: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]


def export_command(words: list[str]) -> None:
    """Export a run, and say what was written."""
    arguments = parse(ExportArguments, words, prog="gatewright export")
    if arguments.file.exists() or arguments.file.suffix != ".safetensors":
        raise FileExistsError(
            f"export writes a new file that ends in .safetensors; got {arguments.file}. Name another."
        )
    trained = load_run(arguments.run)
    export(trained, arguments.file, settings=(arguments.run / "config.yaml").read_text(encoding="utf-8"))
    tensors = trained.model.state_dict().values()
    numbers = sum(tensor.numel() for tensor in tensors)
    print(f"{arguments.file}: {len(tensors)} tensors, {numbers:,} numbers, {arguments.file.stat().st_size:,} bytes")


def export(trained: Trained, path: Path, *, settings: str) -> None:
    """Write a model's weights under their own names, and what it was trained for into the header."""
    header = {
        "format": "pt",
        "config": settings,
        "class_names": json.dumps(trained.class_names),
        "image_shape": json.dumps(trained.image_shape),
    }
    tensors = {name: tensor.detach().contiguous().clone() for name, tensor in trained.model.state_dict().items()}
    content = require("safetensors.torch", "train").save(tensors, header)
    partial = path.with_name(f"{path.name}.partial")
    partial.write_bytes(content)
    partial.replace(path)
