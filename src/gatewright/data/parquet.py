"""Parquet files of a data set, sorted by split."""

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from gatewright.data.sources import SPLIT_NAMES, SplitFiles, is_hidden, split_of
from gatewright.extras import require

SPLIT_NAME = re.compile(rf"({'|'.join(name for names in SPLIT_NAMES.values() for name in names)})(?![a-z])", re.I)


def find_parquet_files(folder: Path) -> SplitFiles:
    """Find the parquet files of each split in a folder and below it.

    A file belongs to the split that its name, or else its folder's name, begins with: `train-00000.parquet`,
    `plain_text/test.parquet`, `train/0000.parquet`. Any of `SPLIT_NAMES` will do, in upper or lower case.

    Raises:
        FileNotFoundError: If the folder, or the training files, are missing.
        ValueError: If one split's files lie in several folders, as when a data set has several configurations, or have
            several names.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path must be a folder of parquet files; there is no folder {folder}")
    files = [file for file in sorted(folder.rglob("*.parquet")) if not any(map(is_hidden, _below(folder, file).parts))]
    found = SplitFiles(*(_of_split(split, files, folder) for split in SPLIT_NAMES))
    if not found.train:
        names = ", ".join(str(_below(folder, file)) for file in files[:5]) or "none"
        raise FileNotFoundError(f"{folder} needs train*.parquet, in itself or a folder below; it has {names}: add them")
    return found


@contextmanager
def readable(file: Path) -> Iterator[None]:
    """Name a file that is not a whole parquet file.

    Raises:
        ValueError: If the file is damaged or is something else.
    """
    arrow = require("pyarrow", "train")
    try:
        yield
    except (OSError, arrow.ArrowException) as error:
        raise ValueError(f"{file} is not a whole parquet file ({error}): copy or download it again") from error


def _below(folder: Path, file: Path) -> Path:
    return file.relative_to(folder)


def _of_split(split: str, files: Sequence[Path], folder: Path) -> list[Path]:
    names = {
        file: name for file in files if (name := _split_name(file.relative_to(folder))) and split_of(name) == split
    }
    folders = sorted({str(file.parent) for file in names})
    if len(folders) > 1:
        raise ValueError(f"{folder} has {split} files in several folders ({', '.join(folders)}): set data.path to one")
    if len(called := sorted(set(names.values()))) > 1:
        raise ValueError(f"the files of one split have one name; {folder} has {', '.join(called)}: keep or rename one")
    return list(names)


def _split_name(file: Path) -> str | None:
    match = SPLIT_NAME.match(file.name) or SPLIT_NAME.match(file.parent.name)
    return match[1].lower() if match else None
