"""Image files sorted into folders by split and class."""

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from gatewright.data.images.sources import EncodedImage, ImageSource, refuse_one_class
from gatewright.data.images.split import TEST_SHARE, with_test_images
from gatewright.data.sources import SPLIT_NAMES, is_hidden, split_of

IMAGE_SUFFIXES = (
    *(".avif", ".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".pbm", ".pgm", ".png", ".pnm", ".ppm"),
    *(".tif", ".tiff", ".webp"),
)
LAYOUT = "images are sorted as train/<class>/ and test/<class>/, with val/<class>/ if you like, or as <class>/ alone"

Classes = Mapping[str, Sequence[Path]]
"""The images of each class that has any, in order of the classes' names."""


def read_folder(folder: Path) -> ImageSource:
    """Label the images below `train/<class>/`, `val/<class>/` and `test/<class>/` with their classes.

    Splits may have any of `SPLIT_NAMES`, in upper or lower case. Where there are classes alone, `<class>/`, all images
    are of the training split. See `with_test_images` for what happens without a test split.

    Nothing is opened yet. `datasets` has a builder for such folders, but it copies every image into a cache of its own
    and does not say which file is broken.

    Raises:
        FileNotFoundError: If the folder, the training split, or the class folders of a split are missing.
        ValueError: If the splits have different classes, there is one class alone, or there are too few images of a
            class.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"data.path must be a folder of images sorted by class; there is no folder {folder}")
    left_out: list[Path] = []
    folders = _split_folders(folder)
    if folders["train"] != folder:
        left_out += sorted(set(folder.iterdir()) - set(folders.values()))
    splits = {split: _images_by_class(path, left_out) for split, path in folders.items()}
    _check_classes(folder, splits)
    labels = {name: label for label, name in enumerate(splits["train"])}
    train, holdout, test = (
        [EncodedImage(str(file), file, labels[name]) for name, files in splits.get(split, {}).items() for file in files]
        for split in SPLIT_NAMES
    )
    source = ImageSource(train, holdout, test, tuple(labels), _notes(folder, left_out))
    refuse_one_class(source, folder)
    if len(splits) == 1:
        _check_enough_for_test(folder, splits["train"])
    return with_test_images(source)


def find_images(folder: Path) -> list[Path]:
    """Find the image files in a folder and in those below it, in order of name; hidden ones are left out."""
    return _images_below(folder, [])


def _split_folders(folder: Path) -> dict[str, Path]:
    """Find the folder of each split; the folder itself is the training split where it holds classes alone."""
    children = [child for child in sorted(folder.iterdir()) if child.is_dir() and not is_hidden(child.name)]
    named = [child for child in children if split_of(child.name)]
    if not any(_is_split(child) for child in named):
        # A class may be called "train"; several such names with images in them are splits without classes.
        if len(named) > 1 or len(named) == len(children):
            raise FileNotFoundError(f"{LAYOUT}; {folder} has {_listed(child.name for child in children)}: sort them so")
        return {"train": folder}
    found = _one_folder_each(folder, named)
    if len(found) == 1 < len(children):
        others = _listed(child.name for child in children if child not in named)
        raise ValueError(
            f"{found['train']} holds folders, so it is the training split, yet {others} lie beside it: move them away; "
            f"or if {found['train'].name} is a class, move its images out of their sub-folders"
        )
    return found


def _one_folder_each(folder: Path, named: Sequence[Path]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for child in named:
        other = found.setdefault(split_of(child.name) or "", child)
        if other is not child:
            raise ValueError(f"a split is one folder; {folder} has {other.name} and {child.name}: keep or rename one")
    if "train" not in found:
        raise FileNotFoundError(f"{LAYOUT}; {folder} has {_listed(child.name for child in named)}: add train")
    return found


def _is_split(folder: Path) -> bool:
    """Tell a folder of class folders from a class, which has images of its own."""
    children = [child for child in folder.iterdir() if not is_hidden(child.name)]
    return any(child.is_dir() for child in children) and not any(_is_image(child) for child in children)


def _images_by_class(split: Path, left_out: list[Path]) -> Classes:
    """Find the images of each class, and add to `left_out` what is neither."""
    classes: dict[str, Sequence[Path]] = {}
    for child in sorted(split.iterdir()):
        images = _images_below(child, left_out) if child.is_dir() and not is_hidden(child.name) else []
        if images:
            classes[child.name] = images
        else:
            left_out.append(child)
    if not classes:
        raise FileNotFoundError(f"{LAYOUT}; {split} has no folder with images ({' '.join(IMAGE_SUFFIXES)}): add them")
    return classes


def _images_below(folder: Path, left_out: list[Path]) -> list[Path]:
    images: list[Path] = []
    for place, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        left_out += [Path(place, name) for name in folders if is_hidden(name)]
        folders[:] = [name for name in folders if not is_hidden(name)]
        for file in (Path(place, name) for name in files):
            (images if _is_image(file) else left_out).append(file)
    return sorted(images)


def _is_image(file: Path) -> bool:
    return file.suffix.lower() in IMAGE_SUFFIXES and not is_hidden(file.name)


def _raise(error: OSError) -> None:
    raise error


def _check_classes(folder: Path, splits: Mapping[str, Classes]) -> None:
    train = set(splits["train"])
    for split, classes in splits.items():
        # A class may be too rare for a validation split that is not the test set.
        missing = set() if split == "holdout" and "test" in splits else train - set(classes)
        if missing or set(classes) - train:
            raise ValueError(
                f"all splits of {folder} must have the same classes; only in train: {_listed(missing)}, only in "
                f"{SPLIT_NAMES[split][0]}: {_listed(set(classes) - train)}: rename or add folders"
            )


def _check_enough_for_test(folder: Path, classes: Classes) -> None:
    least = min(classes, key=lambda name: len(classes[name]))
    count, needed = len(classes[least]), round(1 / TEST_SHARE)
    if count < needed:
        raise ValueError(
            f"without a test folder a fifth of each class is the test set, which takes {needed} images of each; "
            f"{folder} has {count} of {least}: add images, or sort some into test/<class>/"
        )


def _notes(folder: Path, left_out: Sequence[Path]) -> tuple[str, ...]:
    """Count what was left out, by kind."""
    if not left_out:
        return ()
    kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(map(_kind, left_out)).most_common())
    return (f"{folder}: left out what is no image of a class: {kinds} (such as {min(left_out).relative_to(folder)})",)


def _kind(path: Path) -> str:
    if is_hidden(path.name):
        return "hidden"
    if path.is_dir():
        return "folder without images"
    return "image outside the classes" if _is_image(path) else path.suffix.lower() or "without a suffix"


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names)[:5]) or "none"
