"""What to load, how to split it and how to batch it."""

import difflib
import re
from dataclasses import dataclass, field

from gatewright.data.config import BatchConfig

BUILT_IN_NAMES = ("cifar10", "cifar100", "digits", "folder")


@dataclass(frozen=True, kw_only=True)
class AugmentConfig:
    """Random changes made to training images; the defaults make none.

    Attributes:
        flip: mirror each image left to right with probability one half.
        translate: largest shift in pixels, either way, along each side; the rim is filled by reflection.
        crop: smallest share of each side that a random crop keeps, in (0, 1]; the crop is resized back.

    Raises:
        ValueError: a setting is out of range.
    """

    flip: bool = False
    translate: int = 0
    crop: float = 1.0

    def __post_init__(self) -> None:
        if self.translate < 0:
            raise ValueError(f"translate is a number of pixels, 0 or more; got {self.translate}: use 0 for no shift")
        if not 0.0 < self.crop <= 1.0:
            raise ValueError(f"crop is a share of the side in (0, 1]; got {self.crop}: use 1.0 for no crop")


@dataclass(frozen=True, kw_only=True)
class DataConfig(BatchConfig):
    """A labelled image data set and how training reads it.

    Attributes:
        name: `digits` (embedded), `cifar10`, `cifar100`, `folder`, or a Hugging Face data set such as `owner/name`.
        path: a folder of parquet files in the hub's schema, or, for `folder`, of images sorted by split and class, or
            by class alone: see docs/data.md.
        image_size: side in pixels to which every image is resized (centre crop); needed when the images differ in size.
        holdout: share of the training images held out for choosing, in [0, 1), where the data set has no validation
            split beside its test split; the test set is for the final figure.
        cache: folder for decoded images; by default `$GATEWRIGHT_CACHE`, or else `~/.cache/gatewright`.
        augment: random changes made to training images.

    Raises:
        ValueError: a setting is out of range, or `path` is missing or not wanted.
    """

    name: str = "digits"
    path: str | None = None
    image_size: int | None = None
    holdout: float = 0.1
    cache: str | None = None
    augment: AugmentConfig = field(default_factory=AugmentConfig)

    def __post_init__(self) -> None:
        _check_source(self.name, self.path)
        if self.name == "digits" and (self.path is not None or self.image_size is not None):
            given = f"path={self.path!r}, image_size={self.image_size}"
            raise ValueError(f"the digits are embedded, 8x8 pixels, and take neither; got {given}: leave them out")
        if not 0.0 <= self.holdout < 1.0:
            raise ValueError(f"holdout is a share of the training images in [0, 1); got {self.holdout}: try 0.1")
        if self.image_size is not None and self.image_size < 1:
            raise ValueError(f"image_size must be 1 or more; got {self.image_size}")
        super().__post_init__()


def _check_source(name: str, path: str | None) -> None:
    if name not in BUILT_IN_NAMES and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        nearest = difflib.get_close_matches(name, BUILT_IN_NAMES, n=1)
        hint = f"did you mean {nearest[0]!r}?" if nearest else "a hub data set is written owner/name"
        raise ValueError(f"data.name must be one of {', '.join(BUILT_IN_NAMES)} or owner/name; got {name!r}: {hint}")
    if name == "folder" and path is None:
        raise ValueError(
            "data.name 'folder' needs data.path: a folder of train/<class>/ and test/<class>/, or of <class>/ alone"
        )
