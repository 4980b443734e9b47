"""What is known of a data set before its images are decoded."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

TEST_NAMES = ("test", "validation", "val")  # in order of preference


@dataclass(frozen=True)
class SplitFiles:
    """The files that hold each split, in the order in which they are read."""

    train: Sequence[Path]
    test: Sequence[Path]


@dataclass(frozen=True)
class EncodedImage:
    """One labelled image as it lies on disk.

    Attributes:
        place: the file, and the row where it applies, for error messages.
        data: the bytes of a PNG, JPEG or other image file, or the path of one.
        label: position of the class.
    """

    place: str
    data: bytes | Path
    label: int


@dataclass(frozen=True)
class ImageSource:
    """The encoded images of both splits and the names of their classes."""

    train: Sequence[EncodedImage]
    test: Sequence[EncodedImage]
    class_names: tuple[str, ...]
