"""What ``gatewright export`` does: the evaluated model's weights, in one file that any program reads."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gatewright.cli.flags import parse
from gatewright.train import load_run
from gatewright.train.checkpoint.export import save_export
from gatewright.train.folder import is_writable


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
    check_new_file(arguments.file)
    trained = load_run(arguments.run)
    save_export(trained, arguments.file)
    tensors = trained.model.state_dict().values()
    numbers = sum(tensor.numel() for tensor in tensors)
    print(f"{arguments.file}: {len(tensors)} tensors, {numbers:,} numbers, {arguments.file.stat().st_size:,} bytes")


def check_new_file(file: Path) -> None:
    """Refuse a file that cannot be written, before a model is loaded for it.

    Raises:
        ValueError: If its name does not end in .safetensors.
        OSError: If there is such a file already, or its folder is not there or cannot be written to.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"export writes a file that ends in .safetensors; got {file}. Name another.")
    if file.exists():
        raise FileExistsError(f"{file} exists already, and export writes over nothing. Remove it, or name another.")
    if not file.parent.is_dir():
        raise FileNotFoundError(f"export writes into a folder that is there; {file.parent} is none. Make it first.")
    if not is_writable(file.parent):
        raise PermissionError(f"The folder {file.parent} cannot be written to. Name a file in another.")
