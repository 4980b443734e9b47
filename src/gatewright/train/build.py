"""Building the model and the engine of a run from its config and its data."""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from gatewright.layers import ExpertLayer
from gatewright.tasks import Splits, task_named
from gatewright.train.config import RunConfig
from gatewright.train.engines import engine_class
from gatewright.train.phases import dense_phase, seeded, upcycled
from gatewright.train.step import TorchEngine
from gatewright.train.strategies.single import ALONE, Strategy


def build_engine(
    config: RunConfig,
    splits: Splits,
    device: torch.device,
    strategy: Strategy = ALONE,
    *,
    folder: Path | None = None,
    dense: bool = False,
) -> TorchEngine:
    """Make the model for these data, or its dense twin, and the engine that trains it."""
    for warning in task_named(config.task).warnings(config.data, splits) if strategy.rank == 0 else ():
        print(f"warning: {warning}", file=sys.stderr)
    make = engine_maker(config, splits, device, strategy, folder=folder)
    return make(build_model(dense_phase(config) if dense else config, splits, device))


def upcycle_engine(
    engine: TorchEngine, config: RunConfig, splits: Splits, *, folder: Path | None = None
) -> TorchEngine:
    """Return the engine that goes on with the mixture where one has trained the dense twin."""
    make = engine_maker(config, splits, engine.device, engine.strategy, folder=folder)
    return upcycled(engine, seeded(config, lambda: build_model(config, splits, engine.device)), make)


def engine_maker(
    config: RunConfig, splits: Splits, device: torch.device, strategy: Strategy, *, folder: Path | None
) -> Callable[[nn.Module], TorchEngine]:
    """Return what makes the engine of a model, as the run asks for."""
    make = engine_class(config.engine)
    make.prepare(device)
    steps = steps_per_epoch(config, splits.train)
    return partial(make, config=config, device=device, steps_per_epoch=steps, strategy=strategy, folder=folder)


def build_model(config: RunConfig, splits: Splits, device: torch.device) -> nn.Module:
    """Make the model for these data, and refuse one that could not be trained."""
    task = task_named(config.task)
    model = task.build(config.model, task.fingerprint(splits.train))
    task.prepare(model, splits.train)
    check_network(model, config)
    return model


def check_network(model: nn.Module, config: RunConfig) -> None:
    """Refuse batches that are too small for a model: a BatchNorm learns nothing from the variance of one item."""
    inside = {norm for layer in model.modules() if isinstance(layer, ExpertLayer) for norm in layer.experts.modules()}
    if config.data.batch_size == 1 and any(isinstance(m, _BatchNorm) and m not in inside for m in model.modules()):
        raise ValueError(
            "This network has BatchNorm, which learns from the variance of a batch; got `data.batch_size=1`. Use at "
            "least 2."
        )


def steps_per_epoch(config: RunConfig, part: Any) -> int:
    """Count the optimizer steps of one epoch of a training set, and refuse one that has none."""
    task = task_named(config.task)
    batches = task.num_batches(part, config.data)
    if batches < config.optim.accumulation_steps:
        raise ValueError(
            f"An epoch of {task.size(part)} {task.item}s has {batches} batches of {config.data.batch_size}, fewer than "
            f"`optim.accumulation_steps` ({config.optim.accumulation_steps}). Use smaller batches, or accumulate fewer."
        )
    return batches // config.optim.accumulation_steps
