"""Decoded images kept as safetensors files, so that a data set is decoded once."""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

from gatewright.data.images.image_set import ImageSet, ImageSplits
from gatewright.extras import require

FORMAT = 2  # raise it when the content of the files changes

SPLITS = ("train", "holdout", "test")


def cache_folder(chosen: str | None) -> Path:
    """Return the folder chosen, `$GATEWRIGHT_CACHE`, or else `~/.cache/gatewright`."""
    return Path(chosen or os.environ.get("GATEWRIGHT_CACHE") or "~/.cache/gatewright").expanduser()


def cache_name(name: str, image_size: int | None, files: Sequence[Path]) -> str:
    """Name the cache file of a data set, after its content as far as that shows without reading it.

    Args:
        name: of the data set.
        image_size: side to which its images are resized.
        files: that it is read from; their paths, sizes and times of change count. Empty for the hub.
    """
    seen = [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([FORMAT, name, image_size, seen]).encode()).hexdigest()
    return f"{name.replace('/', '--')}-{key[:16]}.safetensors"


def cached(file: Path, prepare: Callable[[], ImageSplits]) -> ImageSplits:
    """Read a data set from a cache file, or prepare and write it.

    Of several processes that ask at once, one prepares while the others wait. A file that cannot be read is rebuilt.

    Args:
        file: of the cache; folders above it are made.
        prepare: decodes the images of all splits.

    Raises:
        ImportError: filelock or safetensors is not installed.
        OSError: the cache cannot be written.
    """
    if (found := _read(file)) is not None:
        return found
    with _writing_to(file.parent):
        file.parent.mkdir(parents=True, exist_ok=True)
        held = require("filelock", "train").FileLock(f"{file}.lock").acquire()
    with held:
        # Whoever held the lock before has most likely written the file.
        if (found := _read(file)) is not None:
            return found
        prepared = prepare()
        _write(file, prepared)
    return prepared


def _read(file: Path) -> ImageSplits | None:
    safetensors = require("safetensors", "train")
    if not file.is_file():
        return None
    try:
        with safetensors.safe_open(file, framework="pt") as stored:
            class_names = tuple(json.loads(stored.metadata()["class_names"]))
            tensors = {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118 it is no dictionary
        return ImageSplits(
            *(ImageSet(tensors[f"{split}.images"], tensors[f"{split}.labels"], class_names) for split in SPLITS)
        )
    except (OSError, KeyError, TypeError, ValueError, safetensors.SafetensorError):
        return None


def _write(file: Path, splits: ImageSplits) -> None:
    parts: dict[str, ImageSet] = {split: getattr(splits, split) for split in SPLITS}
    tensors = {f"{split}.images": part.images for split, part in parts.items()}
    tensors |= {f"{split}.labels": part.labels for split, part in parts.items()}
    # Written whole under another name first: no process ever sees half a file, even where locks do not work.
    partial = file.with_name(f"{file.name}.{uuid4().hex}.partial")
    try:
        with _writing_to(file.parent):
            save_file = require("safetensors.torch", "train").save_file
            save_file(tensors, partial, metadata={"class_names": json.dumps(splits.train.class_names)})
            os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


@contextmanager
def _writing_to(folder: Path) -> Iterator[None]:
    safetensors = require("safetensors", "train")
    try:
        yield
    except (OSError, safetensors.SafetensorError) as error:
        rule = "decoded images are kept in a cache folder that can be written to"
        raise OSError(f"{rule}; {folder} cannot ({error}): set data.cache or GATEWRIGHT_CACHE to another") from error
