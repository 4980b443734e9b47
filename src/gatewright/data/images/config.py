"""What to load, how to split it and how to batch it."""

from dataclasses import field
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, PositiveInt

from gatewright.data.config import BatchConfig, check_data_name
from gatewright.settings import settings

BUILT_IN_NAMES = ("cifar10", "cifar100", "digits", "folder")
SHAPES = {"digits": ((1, 8, 8), 10), "cifar10": ((3, 32, 32), 10), "cifar100": ((3, 32, 32), 100)}


@settings("data.augment")
class AugmentConfig:
    """Random changes made to training images; the defaults make none.

    Args:
        flip: Mirror each image left to right with probability one half.
        alternate_flip: Mirror each image in every other epoch, in the even or the odd ones by chance
            (https://arxiv.org/abs/2404.00498 section 3.6); with `flip` too it is by chance in every epoch.
        rotate: Turn each image by a quarter turn, a half, three quarters or not at all.
        translate: Largest shift in pixels, either way, along each side; the rim is filled by reflection.
        crop: Smallest share of each side that a random crop keeps, in (0, 1]; the crop is resized back.

    Raises:
        ValueError: If a setting is out of range.
    """

    flip: bool = False
    alternate_flip: bool = False
    rotate: bool = False
    translate: NonNegativeInt = 0
    crop: Annotated[float, Field(gt=0, le=1)] = 1.0


@settings("data")
class DataConfig(BatchConfig):
    """A labelled image data set and how training reads it.

    Args:
        name: `digits` (embedded), `cifar10`, `cifar100`, `folder`, or a Hugging Face data set such as `owner/name`.
        path: A folder of parquet files in the hub's schema, or, for `folder`, of images sorted by split and class, or
            by class alone: see docs/data.md.
        image_size: Side in pixels to which every image is resized (centre crop); needed when the images differ in size.
        holdout: Share of the training images held out for choosing, in [0, 1), where the data set has no validation
            split beside its test split; the test set is for the final figure.
        cache: Folder for decoded images; by default `$GATEWRIGHT_CACHE`, or else `~/.cache/gatewright`.
        rotate: Whether every image of the data set is turned by 0, 90, 180 or 270 degrees, always by the same.
        augment: Random changes made to training images.

    Raises:
        ValueError: If a setting is out of range, or `path` is missing or not wanted.
    """

    name: str = "digits"
    path: str | None = None
    image_size: PositiveInt | None = None
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    cache: str | None = None
    rotate: bool = False
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        check_data_name(self.name, BUILT_IN_NAMES)
        if self.name == "folder" and self.path is None:
            raise ValueError(
                "`data.name=folder` needs `data.path`: a folder of train/<class>/ and test/<class>/, or of <class>/ "
                "alone"
            )
        if self.name == "digits" and (self.path is not None or self.image_size is not None):
            raise ValueError(
                "The digits are embedded and have 8x8 pixels: they take neither `data.path` nor `data.image_size`; "
                f"got {self.path!r} and {self.image_size}. Leave them out."
            )

    @property
    def source(self) -> str:
        """Where the images come from: a folder, the hub, or the library that embeds them."""
        if self.path is not None:
            return str(Path(self.path).expanduser().resolve())
        return "embedded in scikit-learn" if self.name == "digits" else "Hugging Face hub"

    @property
    def known_shape(self) -> tuple[tuple[int, int, int], int] | None:
        """The shape of an image and the number of classes, where they are known before anything is loaded."""
        if (known := SHAPES.get(self.name)) is None:
            return None
        (channels, height, width), num_classes = known
        return (channels, self.image_size or height, self.image_size or width), num_classes
