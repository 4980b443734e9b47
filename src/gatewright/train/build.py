"""From a config and data to the engine that trains."""

import sys
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from gatewright.tasks import Splits, task_named
from gatewright.train.config import RunConfig
from gatewright.train.limits import check_network
from gatewright.train.step import TorchEngine
from gatewright.train.strategies.base import ALONE, Processes


def build_engine(
    config: RunConfig,
    splits: Splits,
    device: torch.device,
    processes: Processes = ALONE,
    *,
    folder: Path | None = None,
) -> TorchEngine:
    """Make the model for these data, and the engine that trains it; DeepSpeed's has a folder for its checkpoints."""
    make: Callable[..., TorchEngine] = TorchEngine
    if config.engine == "deepspeed":
        deepspeed = import_module("gatewright.integrations.deepspeed.engine")
        deepspeed.start_deepspeed(device)  # Its own layer in a model asks it for the device.
        make = partial(deepspeed.DeepSpeedEngine, folder=folder)
    task = task_named(config.task)
    steps = steps_per_epoch(config, splits.train)
    for warning in task.warnings(config.data, splits) if processes.rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)
    model = task.build(config.model, task.fingerprint(splits.train))
    task.prepare(model, splits.train)
    check_network(model, config, device)
    return make(model, config, device=device, steps_per_epoch=steps, processes=processes)


def steps_per_epoch(config: RunConfig, part: Any) -> int:
    """Count the optimizer steps of one epoch of a training set.

    Raises:
        ValueError: If an epoch has fewer batches than one step takes.
    """
    task = task_named(config.task)
    batches = task.num_batches(part, config.data)
    if batches < config.optim.accumulation_steps:
        raise ValueError(
            f"An epoch of {task.size(part)} {task.item}s has {batches} batches of {config.data.batch_size}, fewer than "
            f"accumulation_steps ({config.optim.accumulation_steps}). Use smaller batches or fewer accumulation steps."
        )
    return batches // config.optim.accumulation_steps
