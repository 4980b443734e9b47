"""Where documents come from: the standard library's sources, text files, and parquet files with a column of text."""

import os
import sysconfig
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from gatewright.data.parquet import readable
from gatewright.data.sources import SPLITS, SplitFiles, is_hidden, split_of
from gatewright.extras import require

INSTALLED = {"site-packages", "dist-packages"}
"""Folders inside the standard library's that hold other libraries."""

TEXT_PROBE = 8192
"""How many bytes of a file are looked at to tell whether it is text."""


@dataclass(frozen=True)
class TextSource:
    """The documents of each split, and sentences that the user is told once."""

    train: Sequence[bytes]
    holdout: Sequence[bytes] = ()
    test: Sequence[bytes] = ()
    notes: tuple[str, ...] = ()


def standard_library_files() -> list[Path]:
    """Find the Python sources of the running interpreter's standard library, in order of their names.

    Raises:
        FileNotFoundError: If this Python was installed without them, as some small images and frozen programs are.
    """
    folder = Path(sysconfig.get_paths()["stdlib"])
    files = [file for file in files_below(folder) if file.suffix == ".py" and INSTALLED.isdisjoint(file.parts)]
    if not files:
        raise FileNotFoundError(
            f"name='python' trains on the standard library's own sources; {folder} has none. Install Python with its "
            "sources, or set name to 'text' and path to a file or folder of text."
        )
    return files


def text_files(path: Path) -> SplitFiles:
    """Find a text file, or the files of a folder, sorted by split where its sub-folders are named after splits.

    Raises:
        FileNotFoundError: If there is no such file or folder, it holds no files, or it has splits but none to train on.
    """
    if path.is_file():
        return SplitFiles([path])
    if not path.is_dir():
        raise FileNotFoundError(f"path is a text file or a folder of text files; there is no {path}.")
    named = {split_of(child.name): child for child in sorted(path.iterdir()) if child.is_dir()}
    folders = {split: named[split] for split in SPLITS if split in named} or {"train": path}
    found = SplitFiles(*(files_below(folders[split]) if split in folders else [] for split in SPLITS))
    if not found.train:
        raise FileNotFoundError(
            f"training needs text files; {folders.get('train', path / 'train')} has none: add some."
        )
    return found


def read_text_files(files: SplitFiles) -> TextSource:
    """Read every file as one document; files that hold a NUL byte are no text, and are left out.

    Raises:
        ValueError: If no training file holds text.
    """
    contents = {file: file.read_bytes() for file in files.files}
    binary = {file for file, content in contents.items() if b"\0" in content[:TEXT_PROBE]}
    train, holdout, test = (
        [contents[file] for file in part if file not in binary] for part in (files.train, files.holdout, files.test)
    )
    source = TextSource(train, holdout, test, _left_out(binary, len(contents)))
    if not any(source.train):
        raise ValueError(f"training needs text; the files to train on, such as {files.train[0]}, hold none.")
    return source


def read_parquet_text(files: SplitFiles, column: str | None) -> TextSource:
    """Read every row of a column of strings as one document; rows without a text are left out.

    Raises:
        ImportError: If datasets is not installed.
        ValueError: If a file is damaged or has no such column, or there is nothing to train on.
    """
    train, holdout, test = (
        [row for file in part for row in _rows(file, column)] for part in (files.train, files.holdout, files.test)
    )
    if not any(train):
        raise ValueError(f"training needs text; the rows of {files.train[0]} hold none.")
    return TextSource(train, holdout, test)


def _left_out(files: Collection[Path], total: int) -> tuple[str, ...]:
    return (f"left out {len(files)} of {total} files, which hold no text, such as {min(files)}",) if files else ()


def _rows(file: Path, column: str | None) -> Iterator[bytes]:
    datasets, parquet = require("datasets", "train"), require("pyarrow.parquet", "train")
    with readable(file):
        schema = parquet.read_schema(file)
    features = datasets.Features.from_arrow_schema(schema)
    texts = [name for name, feature in features.items() if getattr(feature, "dtype", "") in ("string", "large_string")]
    chosen = [name for name in texts if name == column] if column else texts
    if len(chosen) != 1:
        asked = f"column={column!r}" if column else "column=None, which takes the only one"
        raise ValueError(
            f"{file}: the text is a column of strings; got {asked}, and its columns of strings are "
            f"{', '.join(texts) or 'none'}. Set column to one of them."
        )
    with readable(file):
        table = parquet.ParquetFile(file).read(chosen)
    return ((text or "").encode() for text in table[chosen[0]].to_pylist())


def files_below(folder: Path) -> list[Path]:
    """Find all files in a folder and in those below it, in order of name; hidden ones are left out."""
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not is_hidden(name)]
        found += [Path(place, name) for name in names if not name.startswith(".")]  # __init__.py is no hidden file.
    return sorted(found)
