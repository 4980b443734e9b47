"""Image files sorted into folders by split and class."""

from collections.abc import Sequence
from pathlib import Path

import torch

from gatewright.data.sources import TEST_NAMES, EncodedImage, ImageSource, SplitFiles
from gatewright.data.split import stratified_split

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
TEST_SEED = 2
"""Of the test set where a folder has none: a constant, because runs are compared on the same images."""


def find_image_files(folder: Path) -> SplitFiles:
    """Find `train/<class>/*` and `test/<class>/*` (or `validation`, or `val`) in a folder.

    Where there are classes alone, `<class>/*`, a fifth of each is the test set: the same images every time.

    Raises:
        FileNotFoundError: the folder, a split's folder, or the images of a class are missing.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path must be a folder of images sorted by class; there is no folder {folder}")
    if not any((folder / name).is_dir() for name in ("train", *TEST_NAMES)) and any(folder.glob("*/")):
        return _split_off_a_fifth(_images_by_class(folder))
    test = next((name for name in TEST_NAMES if (folder / name).is_dir()), TEST_NAMES[0])
    return SplitFiles(_images_by_class(folder / "train"), _images_by_class(folder / test))


def read_folder(files: SplitFiles) -> ImageSource:
    """Label each image file with the class whose folder it lies in; classes are in order of name.

    Nothing is opened yet. `datasets` has a builder for such folders, but it copies every image into a cache of its own
    and does not say which file is broken.

    Raises:
        ValueError: train and test have different classes.
    """
    train_classes, test_classes = ({file.parent.name for file in split} for split in (files.train, files.test))
    if train_classes != test_classes:
        raise ValueError(
            f"train and test must have the same class folders; only in train: {_listed(train_classes - test_classes)}, "
            f"only in test: {_listed(test_classes - train_classes)}: rename or add folders"
        )
    labels = {name: label for label, name in enumerate(sorted(train_classes))}
    train, test = (
        [EncodedImage(str(file), file, labels[file.parent.name]) for file in split]
        for split in (files.train, files.test)
    )
    return ImageSource(train, test, tuple(labels))


def _split_off_a_fifth(files: Sequence[Path]) -> SplitFiles:
    classes = sorted({file.parent.name for file in files})
    labels = torch.tensor([classes.index(file.parent.name) for file in files])
    train, test = stratified_split(labels, 0.2, seed=TEST_SEED)
    return SplitFiles([files[place] for place in train.tolist()], [files[place] for place in test.tolist()])


def _images_by_class(split: Path) -> Sequence[Path]:
    classes = sorted(child for child in split.glob("*/") if not child.name.startswith("."))
    if not classes:
        raise FileNotFoundError(f"images must be sorted as {split}/<class>/<image>; found no class folder there")
    return [file for folder in classes for file in _images_in(folder)]


def _images_in(folder: Path) -> Sequence[Path]:
    found = sorted(file for file in folder.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
    if not found:
        suffixes = " ".join(IMAGE_SUFFIXES)
        raise FileNotFoundError(
            f"{folder} must hold the images of one class ({suffixes}); found none: add or remove it"
        )
    return found


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "none"
