"""One function from a config to text."""

import sys
from dataclasses import replace
from pathlib import Path

from gatewright.data.cache import cache_folder, cache_name, cached
from gatewright.data.hub import download_parquet
from gatewright.data.parquet import find_parquet_files
from gatewright.data.sources import SPLITS, SplitFiles
from gatewright.data.text.config import TextConfig
from gatewright.data.text.sources import (
    TextSource,
    read_parquet_text,
    read_text_files,
    standard_library_files,
    text_files,
)
from gatewright.data.text.split import with_held_out_documents, with_test_documents
from gatewright.data.text.text_set import TextSet, TextSplits

INSTEAD = "set `data.name=text` and `data.path` to a file or folder of text, or `data.name=python`"


def load_text(config: TextConfig) -> TextSplits:
    """Load a text data set, split as the config says.

    It is read once and kept in the cache folder. The copy of a hub data set is used from then on without asking the
    hub; that of local files is made anew when a file changes. What is left out, and where test documents come from if
    there is no test split, is said when the text is read.

    Raises:
        ConnectionError: If the hub cannot be reached; the message lists local alternatives.
        FileNotFoundError: If `config.path` or the training split in it is missing, or the standard library's sources
            are.
        ImportError: If a library of the `train` extra is not installed.
        OSError: If the cache cannot be written.
        ValueError: If the data are damaged, of the wrong schema, or too little.
    """
    found = local_text_files(config)
    name = cache_name(f"text-{config.name}", [config.column, config.holdout], found.files if found else [])
    file = cache_folder(config.cache) / name

    def prepare() -> TextSplits:
        source = with_test_documents(_read(config, found))
        for note in source.notes if config.name != "python" else ():  # Its split is no news.
            print(f"warning: {note}.", file=sys.stderr)
        source = with_held_out_documents(source, config.holdout)
        return TextSplits(*map(TextSet.pack, (source.train, source.holdout, source.test)))

    splits = cached(TextSplits, file, prepare)
    reading = {"context": config.context, "python": config.name == "python"}
    return TextSplits(*(replace(getattr(splits, split), **reading) for split in SPLITS))


def local_text_files(config: TextConfig) -> SplitFiles | None:
    """Find the files of a data set that lies here; None for one that is on the hub.

    Raises:
        FileNotFoundError: If `config.path` or the training split in it is missing, or the standard library's sources
            are.
        ValueError: If the files of a split lie in several folders, or have several names.
    """
    if config.name == "python":
        return SplitFiles(standard_library_files())
    if config.path is None:
        return None
    path = Path(config.path).expanduser()
    return text_files(path) if config.name == "text" else find_parquet_files(path)


def _read(config: TextConfig, found: SplitFiles | None) -> TextSource:
    if config.name in ("python", "text"):
        assert found is not None
        return read_text_files(found)
    return read_parquet_text(found or find_parquet_files(download_parquet(config.name, instead=INSTEAD)), config.column)
