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
    channels, height, width = splits.train.images.shape[1:]
    network = config.model.build((channels, height, width), len(splits.train.class_names))
    model: nn.Module = ImageClassifier(network, mean.tolist(), std.tolist())
    check_network(model, config, device)
    make = TorchEngine if config.engine == "torch" else partial(DeepSpeedEngine, folder=folder)
    steps = steps_per_epoch(config, len(splits.train))
    return make(model, config, device=device, steps_per_epoch=steps, processes=processes)


def steps_per_epoch(config: RunConfig, num_images: int) -> int:
    """Count the optimizer steps of one epoch.

    Raises:
        ValueError: If there is none.
    """
    batches = num_batches(num_images, config.data.batch_size)
    if batches < config.optim.accumulation_steps:
        raise ValueError(
            f"An epoch of {num_images} images has {batches} batches of {config.data.batch_size}, fewer than "
            f"accumulation_steps ({config.optim.accumulation_steps}). Use smaller batches or fewer accumulation steps."
        )
    return batches // config.optim.accumulation_steps
