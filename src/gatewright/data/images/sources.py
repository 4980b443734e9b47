"""What is known of a data set before its images are decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class EncodedImage:
    """One labelled image as it lies on disk.

    Args:
        place: The file, and its row where it has rows, for error messages.
        data: The bytes of a PNG, JPEG or other image file, or the path of one.
        label: Position of the class.
    """

    place: str
    data: bytes | Path
    label: int


@dataclass(frozen=True)
class ImageSource:
    """The encoded images of every split and the names of their classes.

    Args:
        train: The images to learn from.
        holdout: The images of a validation split; empty where there is none.
        test: The images for the final figure.
        class_names: One name per class.
        notes: Sentences that the user is told once, such as what was left out.
    """

    train: Sequence[EncodedImage]
    holdout: Sequence[EncodedImage]
    test: Sequence[EncodedImage]
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()


def refuse_one_class(source: ImageSource, folder: Path) -> None:
    """Refuse training images that leave nothing to tell apart.

    Raises:
        ValueError: If there are no two classes with training images.
    """
    found = sorted({image.label for image in source.train})
    if len(found) < 2:
        names = ", ".join(source.class_names[label] for label in found) or "none"
        raise ValueError(
            f"a classifier needs training images of 2 classes or more; {folder} has {len(source.train)} images of "
            f"{len(found)} ({names}): add the images of another class, or set data.path to the folder above all "
            "classes"
        )
