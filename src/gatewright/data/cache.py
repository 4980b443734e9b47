"""Prepared data sets kept as safetensors files, so that each is decoded once."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, Self, TypeVar, runtime_checkable

from torch import Tensor

from gatewright.atomic import atomic_write
from gatewright.extras import require

FORMAT = 2  # raise it when the content of the files changes

Content = tuple[Mapping[str, Tensor], Mapping[str, str]]
"""What a cache file holds: tensors by name, and strings by name."""


@runtime_checkable
class Cacheable(Protocol):
    """A data set that can be written to a cache file and read back."""

    def content(self) -> Content:
        """Return the tensors and strings that make up the data set."""

    @classmethod
    def from_content(cls, tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> Self:
        """Make the data set from what `content` returned."""


T = TypeVar("T", bound=Cacheable)


def cache_folder(chosen: str | None) -> Path:
    """Return the folder chosen, `$GATEWRIGHT_CACHE`, or else `~/.cache/gatewright`."""
    return Path(chosen or os.environ.get("GATEWRIGHT_CACHE") or "~/.cache/gatewright").expanduser()


def cache_name(name: str, setting: object, files: Sequence[Path]) -> str:
    """Name the cache file of a data set, after its content as far as that shows without reading it.

    Args:
        name: The data set's name.
        setting: Further settings that decide the content, such as the side to which images are resized; it is written
            as JSON.
        files: The files that the data set is read from; their paths, sizes and times of change count. Empty for the
            hub.
    """
    seen = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([FORMAT, name, setting, seen]).encode()).hexdigest()
    return f"{name.replace('/', '--')}-{key[:16]}.safetensors"


def cached(kind: type[T], file: Path, prepare: Callable[[], T]) -> T:
    """Read a data set from a cache file, or prepare and write it.

    Of several processes that ask at once, one prepares while the others wait. A file that cannot be read is rebuilt.

    Args:
        kind: The class of the data set.
        file: The cache file; folders above it are made.
        prepare: Function that reads and decodes all splits.

    Raises:
        ImportError: If filelock or safetensors is not installed.
        OSError: If the cache cannot be written.
    """
    if (found := _read(kind, file)) is not None:
        return found
    with _writing_to(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        held = require("filelock", "train").FileLock(f"{file}.lock").acquire()
    with held:
        # Whoever held the lock before has most likely written the file.
        if (found := _read(kind, file)) is not None:
            return found
        prepared = prepare()
        _write(file, *prepared.content())
    return prepared


def _read(kind: type[T], file: Path) -> T | None:
    safetensors = require("safetensors", "train")
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 it is no dictionary
            return kind.from_content(tensors, stored.metadata())
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        return None


def _write(file: Path, tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> None:
    save_file: Any = require("safetensors.torch", "train").save_file
    # No process ever sees half a file, even where locks do not work.
    with _writing_to(file.parent), atomic_write(file) as partial:
        save_file(dict(tensors), partial, metadata=dict(strings))


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    safetensors = require("safetensors", "train")
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        rule = "a prepared data set is kept in a cache folder that can be written to"
        raise OSError(f"{rule}; {folder} cannot ({error}): set data.cache or GATEWRIGHT_CACHE to another") from error
