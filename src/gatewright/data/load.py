"""One function from a config to images."""

import logging
from pathlib import Path

from gatewright.data.cache import cache_folder, cache_name, cached
from gatewright.data.config import DataConfig
from gatewright.data.decode import decode_source
from gatewright.data.digits import load_digits
from gatewright.data.folder import find_image_files, read_folder
from gatewright.data.hub import download_parquet
from gatewright.data.images import ImageSet, ImageSplits
from gatewright.data.parquet import find_parquet_files, read_parquet
from gatewright.data.sources import ImageSource, SplitFiles
from gatewright.data.split import stratified_split

# A constant, not the seed of the run: runs are compared on the same held-out images.
HOLDOUT_SEED = 1


def load_images(config: DataConfig) -> ImageSplits:
    """Load a data set, split as the config says.

    All but the digits are decoded once and kept in the cache folder. The copy of a hub data set is used from then on
    without asking the hub; that of local files is made anew when a file changes.

    Args:
        config: what to load, and the share to hold out.

    Raises:
        ConnectionError: the hub cannot be reached; the message lists local alternatives.
        FileNotFoundError: `config.path` or a split in it is missing.
        ImportError: a library of the `train` extra is not installed.
        OSError: the cache cannot be written.
        ValueError: the data are damaged, of the wrong schema or of several sizes; or no image is left to train on.
    """
    train, test = load_digits() if config.name == "digits" else _load_cached(config)
    kept, held = stratified_split(train.labels, config.holdout, seed=HOLDOUT_SEED)
    if not len(kept):
        raise ValueError(
            f"training needs images; holding out {config.holdout} of {len(train)} leaves none: lower --data.holdout"
        )
    return ImageSplits(train.select(kept), train.select(held), test)


def _load_cached(config: DataConfig) -> tuple[ImageSet, ImageSet]:
    files = local_files(config)
    listed = [*files.train, *files.test] if files else []
    file = cache_folder(config.cache) / cache_name(config.name, config.image_size, listed)

    def prepare() -> tuple[ImageSet, ImageSet]:
        logging.getLogger(__name__).info("decoding %s into %s", config.name, file)
        return decode_source(_read_source(config, files), config.image_size)

    return cached(file, prepare)


def local_files(config: DataConfig) -> SplitFiles | None:
    """Find the files of a data set that lies here; None for one that is embedded or on the hub.

    Raises:
        FileNotFoundError: `config.path` or a split in it is missing.
    """
    if config.path is None:
        return None
    folder = Path(config.path).expanduser()
    return find_image_files(folder) if config.name == "folder" else find_parquet_files(folder)


def _read_source(config: DataConfig, files: SplitFiles | None) -> ImageSource:
    if files is None:
        files = find_parquet_files(download_parquet(config.name))
    return read_folder(files) if config.name == "folder" else read_parquet(files)
