"""Batches for training, in an order that can be taken up again, and for evaluation."""

from collections.abc import Iterator

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatewright.data.images.augment import augment
from gatewright.data.images.config import DataConfig
from gatewright.data.images.image_set import ImageSet, as_floats
from gatewright.data.seeding import generator_for

Batch = tuple[Float[Tensor, "batch channels height width"], Int[Tensor, " batch"]]


def num_batches(num_images: int, batch_size: int) -> int:
    """Count the training batches of one epoch.

    A short last batch counts only from 2 images on: batch normalisation cannot train on 1.
    """
    full, rest = divmod(num_images, batch_size)
    return full + (rest >= 2)


def training_batches(images: ImageSet, config: DataConfig, *, seed: int, epoch: int, start: int = 0) -> Iterator[Batch]:
    """Iterate over the shuffled, augmented batches of one epoch, in [0, 1].

    The order is a function of seed and epoch, and the augmentation of seed, epoch and the batch's number: a run taken
    up again at `start` sees exactly the batches that the first run would have seen. A single image left over at the end
    is dropped (see `num_batches`); the shuffle drops another one each epoch.

    Args:
        images: The training images. Batches are made on the device that holds them.
        config: Batch size and augmentation.
        seed: Seed of the run.
        epoch: Number of the epoch, from 0.
        start: Number of batches of this epoch to skip.

    Raises:
        ValueError: If there are too few images for one batch, or `start` is beyond the epoch.
    """
    count = num_batches(len(images), config.batch_size)
    if not count:
        raise ValueError(
            f"an epoch needs 2 images or a full batch of {config.batch_size}; got {len(images)}: add images"
        )
    if not 0 <= start <= count:
        raise ValueError(
            f"start counts batches of an epoch, 0 to {count}; got {start}: resume with the same batch_size"
        )
    return _training_batches(images, config, seed, epoch, range(start, count))


def evaluation_batches(images: ImageSet, batch_size: int) -> Iterator[Batch]:
    """Iterate over every image exactly once, in order, in [0, 1]; the last batch may be short.

    Raises:
        ValueError: If `batch_size` is less than 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more; got {batch_size}")
    for first in range(0, len(images), batch_size):
        rows = slice(first, first + batch_size)
        yield as_floats(images.images[rows]), images.labels[rows]


def _training_batches(images: ImageSet, config: DataConfig, seed: int, epoch: int, batches: range) -> Iterator[Batch]:
    order = torch.randperm(len(images), generator=generator_for("order", seed, epoch)).to(images.labels.device)
    mirrored = None
    if config.augment.alternate_flip:
        first = torch.rand(len(images), generator=generator_for("flip", seed)) < 0.5
        mirrored = (first ^ (epoch % 2 == 1)).to(images.labels.device)
    for batch in batches:
        rows = order[batch * config.batch_size :][: config.batch_size]
        changed = augment(images.images[rows], config.augment, generator_for("augment", seed, epoch, batch))
        if mirrored is not None:
            changed = torch.where(mirrored[rows][:, None, None, None], changed.flip(-1), changed)
        yield as_floats(changed), images.labels[rows]
