"""One function from a config to images."""

import logging
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from gatewright.data.cache import cache_folder, cache_name, cached
from gatewright.data.hub import download_parquet
from gatewright.data.images.augment import turned
from gatewright.data.images.config import DataConfig
from gatewright.data.images.decode import Shape, decode_source
from gatewright.data.images.digits import load_digits
from gatewright.data.images.folder import read_folder
from gatewright.data.images.image_set import ImageSet, ImageSplits
from gatewright.data.images.parquet import read_parquet
from gatewright.data.images.sources import ImageSource
from gatewright.data.images.split import stratified_split
from gatewright.data.parquet import find_parquet_files
from gatewright.data.seeding import generator_for

# A constant, not the seed of the run: runs are compared on the same held-out images.
HOLDOUT_SEED = 1
INSTEAD = "set `data.name=folder` and `data.path` to a folder of images, or `data.name=digits`"


def load_images(config: DataConfig, *, check: Callable[[Shape], None] = lambda shape: None) -> ImageSplits:
    """Load a data set, split as the config says.

    All but the digits are decoded once and kept in the cache folder. The copy of a hub data set is used from then on
    without asking the hub; that of local files is made anew when a file changes. What is left out, and where test
    images come from if there is no test split, is said when the images are decoded.

    Args:
        config: The settings of the data.
        check: Function that is called with the shape of the first image before the others are decoded; it may raise.

    Raises:
        ConnectionError: If the hub cannot be reached; the message lists local alternatives.
        FileNotFoundError: If `config.path` or the training split in it is missing.
        ImportError: If a library of the `train` extra is not installed.
        OSError: If the cache cannot be written.
        ValueError: If the data are damaged, of the wrong schema, of one class or of several sizes; or no image is left
            to train on.
    """
    splits = load_digits() if config.name == "digits" else _load_cached(config, check)
    splits = splits if len(splits.holdout) else _hold_out(splits, config.holdout)
    return _turned(splits) if config.rotate else splits


def _turned(splits: ImageSplits) -> ImageSplits:
    """Turn every image by a number of quarter turns of its own."""
    parts = []
    for number, part in enumerate((splits.train, splits.holdout, splits.test)):
        turns = torch.randint(4, (len(part),), generator=generator_for("rotate", number))
        parts.append(ImageSet(turned(part.images, turns), part.labels, part.class_names))
    return ImageSplits(*parts)


def local_files(config: DataConfig) -> list[Path] | None:
    """Find the files of a data set that lies here; None for one that is embedded or on the hub.

    Raises:
        FileNotFoundError: If `config.path` or the training split in it is missing.
        ValueError: If the files are not sorted as they must be; see docs/data.md.
    """
    if config.path is None:
        return None
    folder = Path(config.path).expanduser()
    if config.name != "folder":
        return find_parquet_files(folder).files
    source = read_folder(folder)
    return [Path(image.place) for image in (*source.train, *source.holdout, *source.test)]


def _load_cached(config: DataConfig, check: Callable[[Shape], None]) -> ImageSplits:
    files = local_files(config) or []
    file = cache_folder(config.cache) / cache_name(config.name, config.image_size, files)

    def prepare() -> ImageSplits:
        logging.getLogger(__name__).info("decoding %s into %s", config.name, file)
        source = _read_source(config)
        for note in source.notes:
            print(f"warning: {note}.", file=sys.stderr)
        return decode_source(source, config.image_size, check)

    return cached(ImageSplits, file, prepare)


def _read_source(config: DataConfig) -> ImageSource:
    folder = download_parquet(config.name, instead=INSTEAD) if config.path is None else Path(config.path).expanduser()
    return read_folder(folder) if config.name == "folder" else read_parquet(find_parquet_files(folder))


def _hold_out(splits: ImageSplits, share: float) -> ImageSplits:
    kept, held = stratified_split(splits.train.labels, share, seed=HOLDOUT_SEED)
    if not len(kept):
        raise ValueError(
            f"training needs images; holding out {share} of {len(splits.train)} leaves none: lower data.holdout"
        )
    return ImageSplits(splits.train.select(kept), splits.train.select(held), splits.test)
