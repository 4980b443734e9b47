"""Small real data sets, written to disk as the hub and people write them."""

import io

import datasets
import numpy as np
import pyarrow
from PIL import Image
from pyarrow import parquet

FEATURES = {"img": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])}


def pixels(seed, height=6, width=5, channels=3):
    shape = (height, width, channels) if channels > 1 else (height, width)
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def png(array):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def write_parquet(file, columns, features=FEATURES):
    """Write columns as they are, with the description that the datasets library leaves of its features."""
    file.parent.mkdir(parents=True, exist_ok=True)
    schema = datasets.Features(features).arrow_schema
    parquet.write_table(pyarrow.table(columns, schema=schema), file)


def rows(seeds, labels=None, **shape):
    """Make columns of random images; labels alternate unless given."""
    images = [{"bytes": png(pixels(seed, **shape)), "path": None} for seed in seeds]
    return {"img": images, "label": [seed % 2 for seed in seeds] if labels is None else labels}


def write_hub_folder(folder, num_train=20, num_test=6, **shape):
    """Write train.parquet with the images of seeds 0, 1, ... and test.parquet with those of seeds 100, 101, ..."""
    write_parquet(folder / "train.parquet", rows(range(num_train), **shape))
    write_parquet(folder / "test.parquet", rows(range(100, 100 + num_test), **shape))
    return folder


def write_class_folders(folder, splits=("train", "test"), classes=("cat", "dog"), per_class=3):
    """Write PNG files, sorted by split and class."""
    for split_number, split in enumerate(splits):
        for class_number, name in enumerate(classes):
            (folder / split / name).mkdir(parents=True)
            for image in range(per_class):
                seed = 100 * split_number + 10 * class_number + image
                (folder / split / name / f"{image}.png").write_bytes(png(pixels(seed)))
    return folder
