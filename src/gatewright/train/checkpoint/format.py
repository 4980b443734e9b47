"""Checkpoints: safetensors files, written atomically, loaded without executing code, at any number of processes.

Tensors are stored under their path in the state; everything else is JSON in the file's header. Safetensors is chosen
because no other common format holds tensors and cannot hold code. Where experts are spread over processes, each writes
a file of its own experts, its part; the first process's file comes last, names the others' checksums, and makes them
one checkpoint.
"""

import contextlib
import json
import os
import struct
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.atomic import atomic_write
from gatewright.extras import require
from gatewright.parallel import Rows, merge_states

FORMAT = "gatewright-checkpoint-1"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_checkpoint(
    state: dict[str, Any], folder: Path, step: int, *, keep: int = 2, number: int = 0, parts: int = 1
) -> Path:
    """Write a state of nested dicts, lists, numbers, strings and tensors, or one process's part of it.

    The file appears under its name only when it is complete, and a failure leaves the older checkpoints as they are.
    Part 0 is written last and makes the parts one checkpoint. It also deletes all but the newest checkpoints, and what
    a killed process left unfinished.

    Args:
        state: This part of the state, or all of it.
        folder: Folder of the run's checkpoints.
        step: Optimizer steps made.
        keep: Number of checkpoints that stay.
        number: Number of this part; the others are complete before part 0 is written.
        parts: Files of the checkpoint, this one included.

    Raises:
        OSError: If the disk is full or the folder cannot be written; the sentence names the newest good checkpoint.
    """
    main = folder / f"step-{step:08d}.safetensors"
    path = _part(main, number, parts) if number else main
    with _explained(folder, step):
        if number:
            _write(state, path)
            return path
        for stale in folder.glob("*.partial"):  # Of processes that were killed while they wrote.
            stale.unlink(missing_ok=True)
        _write(state, path, [_checksum_of(_part(main, other, parts)) for other in range(1, parts)])
    _delete_old(folder, keep)
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read a state that `save_checkpoint` wrote, with its parts: their dicts are merged, their `Rows` joined.

    Tensors lie in the files until they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file or a part is missing, truncated, damaged, or not a checkpoint of ours.
    """
    if not path.is_file():
        raise FileNotFoundError(f"There is no checkpoint at {path}.")
    state, header = _read(path)
    checksums = json.loads(header.get("parts") or "[]")
    states = [state]
    for number, checksum in enumerate(checksums, 1):
        part = _part(path, number, len(checksums) + 1)
        if not part.is_file():
            raise ValueError(f"{path} is not complete: its part {part} is missing.")
        state, header = _read(part)
        if header["checksum"] != checksum:
            raise ValueError(f"{path} is damaged: {part} is not the part that it was saved with.")
        states.append(state)
    merged: dict[str, Any] = merge_states(states)
    return merged


def newest_checkpoint(folder: Path, *, before: int | None = None) -> Path | None:
    """Return the complete checkpoint of the latest step, or the latest before a step, if there is any."""
    found = [path for path in checkpoints(folder) if before is None or int(path.stem.removeprefix("step-")) < before]
    return found[-1] if found else None


def checkpoints(folder: Path) -> list[Path]:
    """Return the complete checkpoints, in order of their steps."""
    return sorted(folder.glob("step-*.safetensors"))


def _delete_old(folder: Path, keep: int) -> None:
    """Delete all but the newest checkpoints; the file that makes a checkpoint goes before its parts."""
    found = checkpoints(folder)
    for old in found[:-keep]:
        old.unlink(missing_ok=True)
    for part in folder.glob("part-*.safetensors"):
        if not part.name.endswith(tuple(main.name for main in found[-keep:])):
            part.unlink(missing_ok=True)


def _part(path: Path, number: int, parts: int) -> Path:
    return path.with_name(f"part-{number}-of-{parts}-{path.name}")


@contextlib.contextmanager
def _explained(folder: Path, step: int) -> Iterator[None]:
    """Say of an error in writing what is left."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except OSError as error:
        good = newest_checkpoint(folder)
        way_on = f"{good} is intact: go on from it with `resume=True`" if good else "there is no earlier one"
        raise OSError(
            f"The checkpoint of step {step} could not be written to {folder}: {error.strerror or error}. Make room, or "
            f"name another `output`; {way_on}."
        ) from error


def _write(state: dict[str, Any], path: Path, checksums: Sequence[str] = ()) -> None:
    """Write one file, one tensor at a time.

    The safetensors library's own writer takes neither tensors of another layout than contiguous nor two that share
    memory, copies all that are on a GPU first, and makes files that only their owner may read.
    """
    tensors: dict[str, Tensor] = {}
    text, parts = json.dumps(_pack(state, "", tensors)), json.dumps(checksums) if checksums else ""
    header = {"format": FORMAT, "state": text, "checksum": "0" * 8} | ({"parts": parts} if parts else {})
    with atomic_write(path) as partial, partial.open("wb") as file:
        file.write(_head(header, tensors))
        header["checksum"] = _checksum(parts + text, tensors, file.write)
        file.seek(0)
        file.write(_head(header, tensors))
        file.flush()
        os.fsync(file.fileno())


def _head(header: dict[str, str], tensors: dict[str, Tensor]) -> bytes:
    """Return the beginning of a safetensors file (https://huggingface.co/docs/safetensors): where each tensor lies."""
    places: dict[str, Any] = {"__metadata__": header}
    end = 0
    for name, tensor in _in_order(tensors):
        start, end = end, end + tensor.nbytes
        places[name] = {"dtype": DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    words = json.dumps(places).encode()
    words += b" " * (-len(words) % 8)
    return struct.pack("<Q", len(words)) + words


def _in_order(tensors: dict[str, Tensor]) -> list[tuple[str, Tensor]]:
    """Sort tensors so that each begins at a multiple of its item size."""
    return sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))


def _read(path: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the state in one file, and the file's header."""
    with _opened(path) as file:
        header = file.metadata() or {}
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    if header.get("format") != FORMAT:
        raise ValueError(
            f"{path} is not a Gatewright checkpoint: its format is {header.get('format')!r}, not {FORMAT!r}."
        )
    text = header.get("state", "")
    if header.get("checksum") != _checksum(header.get("parts", "") + text, tensors):
        raise ValueError(f"{path} is damaged: its checksum is wrong. Delete it to go on from an older checkpoint.")
    return _unpack(json.loads(text), tensors), header


def _checksum_of(part: Path) -> str:
    """Read the checksum that another process has just written."""
    if not part.is_file():
        raise OSError(f"{part.name} is not there, though another process wrote it: is the folder one that all share?")
    with _opened(part) as file:
        return str(file.metadata()["checksum"])


@contextlib.contextmanager
def _opened(path: Path) -> Iterator[Any]:
    safetensors = require("safetensors", "train")
    try:
        with safetensors.safe_open(path, "pt") as file:
            yield file
    except (safetensors.SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is truncated or not a safetensors file ({error}). Delete it to go on from an older checkpoint."
        ) from error


def _checksum(text: str, tensors: dict[str, Tensor], write: Callable[[memoryview], object] = len) -> str:
    """Sum up everything, so that a disk which changed a byte is found out; write the tensors on the way."""
    checksum = zlib.crc32(text.encode())
    for name, tensor in _in_order(tensors):
        content = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
        write(content)
        checksum = zlib.crc32(f"{name} {tensor.dtype} {list(tensor.shape)}".encode(), checksum)
        checksum = zlib.crc32(content, checksum)
    return f"{checksum:08x}"


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Move tensors out of a state; dicts become lists of pairs, because JSON has no integer keys."""
    if isinstance(value, Rows):
        return {"rows": [_pack(run, path, tensors)["tensor"] for run in value.runs]}
    if isinstance(value, Tensor):
        name = f"{len(tensors)}{path}"  # Numbered, because a key may hold a slash.
        tensors[name] = value
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
    if "rows" in value:
        return Rows(*(tensors[name] for name in value["rows"]))
    if "tensor" in value:
        return tensors[value["tensor"]]
    return {key: _unpack(item, tensors) for key, item in value["dict"]}
