"""Checkpoints: one safetensors file per step, written atomically, loaded without executing code.

Tensors are stored under their path in the state; everything else is JSON in the file's header. Safetensors is chosen
because no other common format holds tensors and cannot hold code.
"""

import contextlib
import json
import os
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.extras import require

FORMAT = "gatewright-checkpoint-1"


def save_checkpoint(state: dict[str, Any], folder: Path, step: int, *, keep: int = 2) -> Path:
    """Write a state of nested dicts, lists, numbers, strings and tensors, and delete all but the newest few.

    The file appears under its name only when it is complete; a failure leaves the older checkpoints as they are. What a
    killed process left unfinished is removed.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the sentence names the newest good checkpoint.
    """
    tensors: dict[str, Tensor] = {}
    text = json.dumps(_pack(state, "", tensors))
    header = {"format": FORMAT, "state": text, "checksum": _checksum(text, tensors)}
    path = folder / f"step-{step:08d}.safetensors"
    partial = folder / f"{path.name}.partial"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for stale in folder.glob("step-*.safetensors.partial"):  # Of a process that was killed while it wrote.
            stale.unlink(missing_ok=True)
        content = require("safetensors.torch", "train").save(tensors, header)
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        good = newest_checkpoint(folder)
        way_on = f"{good} is intact: go on from it with --resume" if good else "there is no earlier one"
        raise OSError(
            f"The checkpoint of step {step} could not be written to {folder}: {error.strerror or error}. Make room, or "
            f"name another --output; {way_on}."
        ) from error
    for old in checkpoints(folder)[:-keep]:
        old.unlink(missing_ok=True)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state that `save_checkpoint` wrote.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, damaged, or not a checkpoint of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, "pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}). Delete it to go on from an older checkpoint."
        ) from error
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a Gatewright checkpoint: its format is {header.get('format')!r}, not {FORMAT!r}."
        )
    text = header.get("state", "")
    if header.get("checksum") != _checksum(text, tensors):
        raise ValueError(f"{path} is damaged: its checksum is wrong. Delete it to go on from an older checkpoint.")
    state: dict[str, Any] = _unpack(json.loads(text), tensors)
    return state


def newest_checkpoint(folder: Path) -> Path | None:
    """Return the complete checkpoint of the latest step, if there is any."""
    found = checkpoints(folder)
    return found[-1] if found else None


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, in order of their steps."""
    return sorted(folder.glob("step-*.safetensors"))


def _checksum(text: str, tensors: dict[str, Tensor]) -> str:
    """Sum up everything, so that a disk which changed a byte is found out."""
    checksum = zlib.crc32(text.encode())
    for name, tensor in sorted(tensors.items()):
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy().data, checksum)
    return f"{checksum:08x}"


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Move tensors out of a state; dicts become lists of pairs, because JSON has no integer keys."""
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{path}"  # Numbered, because a key may hold a slash.
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(value, dict):
        return {"dict": [[key, _pack(item, f"{path}/{key}", tensors)] for key, item in value.items()]}
    if isinstance(value, list | tuple):
        return [_pack(item, f"{path}/{index}", tensors) for index, item in enumerate(value)]
    return value


def _unpack(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        return [_unpack(item, tensors) for item in value]
    if not isinstance(value, dict):
        return value
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _unpack(item, tensors) for key, item in value["dict"]}
