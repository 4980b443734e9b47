"""What a run is, said before it begins; and a run that only says so."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gatewright.tasks import Splits, task_named
from gatewright.train.build import check_network, steps_per_epoch
from gatewright.train.checkpoint.resume import saved_fingerprint
from gatewright.train.config import RunConfig
from gatewright.train.config_file import config_text
from gatewright.train.device import expected_device, find_device
from gatewright.train.folder import RUNS, newest_intact
from gatewright.train.optim import build_optimizers
from gatewright.train.validate import check_start, tell_changes, validate


def announcement(
    config: RunConfig, splits: Splits, output: Path, *, device: torch.device, steps_per_epoch: int, done: int
) -> str:
    """Say in two lines what is trained, on what and where to; `done` steps were made before this began."""
    task = task_named(config.task)
    train, holdout, test = (f"{task.size(part):,}" for part in (splits.train, splits.holdout, splits.test))
    epochs = f"{config.epochs} epoch{'s' if config.epochs > 1 else ''}"
    going_on = f", going on after step {done:,}" if done else ""
    return (
        f"{config.recipe} on {device}: {epochs} of {steps_per_epoch:,} steps{going_on}; {train} "
        f"{task.item}s to train on, {holdout} held out, {test} to test on\nThe run's folder: {output}"
    )


@dataclass(frozen=True)
class Prospect:
    """What a run is going to be; its model has no memory, and is None where the run's engine has to build it."""

    splits: Splits
    saved: dict[str, Any] | None
    steps_per_epoch: int
    model: nn.Module | None


def check_run(config: RunConfig, *, resume: bool, quiet: bool = False) -> Prospect:
    """Refuse all that the processes of a run would refuse, before any of them starts.

    Nothing is written but the cache of the data, and no tracking server is asked.

    Raises:
        OSError: If the run's folder or the data are not what they are to be.
        ValueError: If the settings, the data or the run to resume do not fit together.
    """
    check_start(config, resume)
    validate(config, config.processes, expected_device(config.device, config.processes))
    saved = newest_intact(Path(config.output))[0] if config.output and resume else None
    if saved:
        tell_changes(config, saved, quiet=quiet)
    task = task_named(config.task)
    splits = task.load(config.data, config.model)
    if saved:
        task.check(task.fingerprint(splits.train), saved_fingerprint(saved))
    steps = steps_per_epoch(config, splits.train)
    if config.model.needs_engine:
        return Prospect(splits, saved, steps, None)
    with torch.device("meta"):
        model = task.build(config.model, task.fingerprint(splits.train))
    check_network(model, config)
    build_optimizers(model, config.optim)
    return Prospect(splits, saved, steps, model)


def preview(config: RunConfig, *, resume: bool = False) -> str:
    """Check a run as `check_run` does, and return its settings and what would be trained."""
    found = check_run(config, resume=resume)
    said = announcement(
        config,
        found.splits,
        Path(config.output or f"{RUNS}/{config.recipe}-DATE-TIME"),
        device=find_device(config.device),
        steps_per_epoch=found.steps_per_epoch,
        done=found.saved["engine"]["step_count"] if found.saved else 0,
    )
    return f"{config_text(config)}\n{said}\n{_network(config, found.model)}\nNothing was trained: --dry-run.\n"


def _network(config: RunConfig, model: nn.Module | None) -> str:
    """Say how large the network is."""
    if model is None:
        return f"The network: its {config.model.layer} layer is built when the run begins."
    parameters = sum(parameter.numel() for parameter in model.parameters())
    experts = f"{config.model.num_experts} experts" if config.model.num_experts > 1 else "no mixture"
    return f"The network: {parameters:,} parameters, {experts}"
