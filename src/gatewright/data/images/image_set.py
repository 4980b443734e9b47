"""Labelled images in memory, and what is measured and selected on them."""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import torch
from jaxtyping import Float, Int, Int64, UInt8
from torch import Tensor

from gatewright.data.cache import Content
from gatewright.data.sources import SPLITS

NUM_LEVELS = 256


@dataclass(frozen=True, eq=False)
class ImageSet:
    """Labelled images of one size.

    Args:
        images: Grey (1 channel) or RGB (3 channels), 0 to 255.
        labels: Positions in `class_names`.
        class_names: One name per class.

    Raises:
        ValueError: If labels and images differ in number, or a label is not a position in `class_names`.
    """

    images: UInt8[Tensor, "images channels height width"]
    labels: Int64[Tensor, " images"]
    class_names: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.images) != len(self.labels):
            raise ValueError(f"every image needs one label; got {len(self.images)} images, {len(self.labels)} labels")
        if not self.labels.is_cpu:  # They were checked where they were read, and a GPU would be waited for.
            return
        wrong = ((self.labels < 0) | (self.labels >= len(self.class_names))).nonzero()
        if len(wrong):
            row = int(wrong[0])
            raise ValueError(
                f"labels must lie between 0 and {len(self.class_names) - 1}, as there are {len(self.class_names)} "
                f"classes; got {int(self.labels[row])} in row {row}: correct the label or name every class"
            )

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.images)

    def select(self, index: Int[Tensor, " chosen"]) -> Self:
        """Return the images at these positions, in this order.

        Raises:
            IndexError: If a position is outside the set.
        """
        return type(self)(self.images[index], self.labels[index], self.class_names)

    def to(self, device: torch.device) -> Self:
        """Return the images on a device."""
        return type(self)(self.images.to(device), self.labels.to(device), self.class_names)

    @property
    def nbytes(self) -> int:
        """The bytes of images and labels."""
        return self.images.nbytes + self.labels.nbytes

    @property
    def digest(self) -> str:
        """A hash of pixels, labels and names of the classes."""
        content = hashlib.blake2b(json.dumps(self.class_names).encode(), digest_size=8)
        for tensor in (self.images, self.labels):
            content.update(tensor.contiguous().numpy().data)
        return content.hexdigest()


@dataclass(frozen=True, eq=False)
class ImageSplits:
    """The three parts of a data set, which share size, channels and classes.

    Args:
        train: The images to learn from.
        holdout: Images kept aside for choosing: the validation split, or else `DataConfig.holdout` of the training
            images, which may be none.
        test: The images for the final figure only.
    """

    train: ImageSet
    holdout: ImageSet
    test: ImageSet

    def content(self) -> Content:
        """Return what a cache file keeps."""
        parts = {split: getattr(self, split) for split in SPLITS}
        images = {f"{split}.images": part.images for split, part in parts.items()}
        labels = {f"{split}.labels": part.labels for split, part in parts.items()}
        return images | labels, {"class_names": json.dumps(self.train.class_names)}

    @classmethod
    def from_content(cls, tensors: Mapping[str, Tensor], strings: Mapping[str, str]) -> Self:
        """Make the splits from what a cache file kept."""
        names = tuple(json.loads(strings["class_names"]))
        return cls(*(ImageSet(tensors[f"{split}.images"], tensors[f"{split}.labels"], names) for split in SPLITS))


def as_floats(images: UInt8[Tensor, "*batch channels height width"]) -> Float[Tensor, "*batch channels height width"]:
    """Map grey levels 0 to 255 to [0, 1], as training, evaluation and prediction all do."""
    return images.float().div_(NUM_LEVELS - 1)


def channel_statistics(images: ImageSet) -> tuple[Float[Tensor, " channels"], Float[Tensor, " channels"]]:
    """Measure the mean and standard deviation of each channel, in units of [0, 1].

    The deviation is never less than one grey level, so that a constant channel can be divided by it.

    Raises:
        ValueError: If there are no images.
    """
    if not len(images):
        raise ValueError("channel statistics need at least 1 image; got 0: pass the training images")
    # Counting grey levels is exact and, unlike images.float(), needs no copy four times the size of the set.
    counts = torch.stack([channel.flatten().bincount(minlength=NUM_LEVELS) for channel in images.images.unbind(1)])
    share = counts.double() / counts.sum(1, keepdim=True)
    levels = torch.linspace(0, 1, NUM_LEVELS, dtype=torch.float64)
    mean = share @ levels
    variance = (share * (levels - mean[:, None]).square()).sum(1)
    return mean.float(), variance.sqrt().clamp(min=1 / (NUM_LEVELS - 1)).float()
