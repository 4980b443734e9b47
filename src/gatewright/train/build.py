"""From a config and images to the engine that trains."""

from functools import partial
from pathlib import Path

import torch
from torch import nn

from gatewright.data import ImageSplits, channel_statistics, num_batches
from gatewright.models import ImageClassifier
from gatewright.train.config import RunConfig
from gatewright.train.deepspeed_engine import DeepSpeedEngine, start_deepspeed
from gatewright.train.engine import TorchEngine
from gatewright.train.limits import check_network
from gatewright.train.processes import ALONE, Processes


def build_engine(
    config: RunConfig,
    splits: ImageSplits,
    device: torch.device,
    processes: Processes = ALONE,
    *,
    folder: Path | None = None,
) -> TorchEngine:
    """Make the model for these images, and the engine that trains it; DeepSpeed's has a folder for its checkpoints."""
    if config.engine == "deepspeed":
        start_deepspeed(device)  # Its own layer in a model asks it for the device.
    mean, std = channel_statistics(splits.train)
    steps_per_epoch = count_steps(config, splits)
    network = build_network(config, splits)
    model: nn.Module = ImageClassifier(network, mean.tolist(), std.tolist())
    check_network(model, config, device)
    make = TorchEngine if config.engine == "torch" else partial(DeepSpeedEngine, folder=folder)
    return make(model, config, device=device, steps_per_epoch=steps_per_epoch, processes=processes)


def build_network(config: RunConfig, splits: ImageSplits) -> nn.Module:
    """Make the network for images of this shape and these classes."""
    channels, height, width = splits.train.images.shape[1:]
    return config.model.build((channels, height, width), len(splits.train.class_names))


def count_steps(config: RunConfig, splits: ImageSplits) -> int:
    """Return the optimizer steps of an epoch.

    Raises:
        ValueError: If an epoch has fewer batches than one step takes.
    """
    batches = num_batches(len(splits.train), config.data.batch_size)
    if batches < config.optim.accumulation_steps:
        raise ValueError(
            f"An epoch of {len(splits.train)} images has {batches} batches of {config.data.batch_size}, fewer than "
            f"accumulation_steps ({config.optim.accumulation_steps}). Use smaller batches or fewer accumulation steps."
        )
    return batches // config.optim.accumulation_steps
