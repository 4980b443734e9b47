"""From a config and images to the engine that trains."""

import sys
from pathlib import Path

import torch
from torch import nn

from gatewright.data import ImageSplits, channel_statistics, num_batches
from gatewright.models import ImageClassifier
from gatewright.train.config import RunConfig
from gatewright.train.engines import engine_class
from gatewright.train.limits import check_network
from gatewright.train.step import TorchEngine
from gatewright.train.strategies.base import ALONE, Processes


def check_image_shape(config: RunConfig, image_shape: tuple[int, int, int]) -> None:
    """Build the model without memory, to refuse images that are too small for it before all of them are decoded.

    Raises:
        ValueError: If the model does not take images of this shape.
    """
    if config.model.needs_engine:
        return
    with torch.random.fork_rng(devices=[]), torch.device("meta"):
        config.model.build(image_shape, 2)


def warn_of_few_images(config: RunConfig, splits: ImageSplits) -> None:
    """Say where there are too few images for what the settings ask for."""
    num_images, batch_size = len(splits.train), config.data.batch_size
    if num_images < batch_size:
        print(
            f"warning: {num_images} training images are fewer than one batch (data.batch_size is {batch_size}), so an "
            "epoch is a single step and experts may stay without images: set it to "
            f"{max(2, num_images // 8)} or so, and use few experts.",
            file=sys.stderr,
        )
    if config.data.holdout and not len(splits.holdout):
        print(
            f"warning: data.holdout ({config.data.holdout}) of {num_images} training images is no image, so nothing is "
            "evaluated between epochs: raise it, or add images.",
            file=sys.stderr,
        )


def build_engine(
    config: RunConfig,
    splits: ImageSplits,
    device: torch.device,
    processes: Processes = ALONE,
    *,
    folder: Path | None = None,
) -> TorchEngine:
    """Build the model for these images, and the engine that trains it, with a folder for checkpoints of its own."""
    make = engine_class(config.engine)
    make.prepare(device)
    mean, std = channel_statistics(splits.train)
    steps = steps_per_epoch(config, len(splits.train))
    if processes.rank == 0:
        warn_of_few_images(config, splits)
    network = build_network(config, splits)
    model: nn.Module = ImageClassifier(network, mean.tolist(), std.tolist())
    check_network(model, config, device)
    return make(model, config, device=device, steps_per_epoch=steps, processes=processes, folder=folder)


def build_network(config: RunConfig, splits: ImageSplits) -> nn.Module:
    """Make the network for images of this shape and these classes."""
    channels, height, width = splits.train.images.shape[1:]
    return config.model.build((channels, height, width), len(splits.train.class_names))


def steps_per_epoch(config: RunConfig, num_images: int) -> int:
    """Count the optimizer steps of one epoch.

    Raises:
        ValueError: If an epoch has fewer batches than one step takes.
    """
    batches = num_batches(num_images, config.data.batch_size)
    if batches < config.optim.accumulation_steps:
        raise ValueError(
            f"An epoch of {num_images} images has {batches} batches of {config.data.batch_size}, fewer than "
            f"accumulation_steps ({config.optim.accumulation_steps}). Use smaller batches or fewer accumulation steps."
        )
    return batches // config.optim.accumulation_steps
