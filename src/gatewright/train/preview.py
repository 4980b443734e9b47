"""What a run is, said before it begins; and a run that only says so."""

from pathlib import Path

import torch

from gatewright.tasks import Splits, task_named
from gatewright.train.build import check_network, steps_per_epoch
from gatewright.train.config import RunConfig
from gatewright.train.config_file import config_text
from gatewright.train.device import expected_device, find_device
from gatewright.train.folder import RUNS, newest_intact
from gatewright.train.optim import build_optimizers
from gatewright.train.strategies.single import ALONE
from gatewright.train.validate import check_start, check_trained_on, tell_changes, validate


def announcement(
    config: RunConfig, splits: Splits, output: Path, *, device: torch.device, steps_per_epoch: int, done: int = 0
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


def preview(config: RunConfig, *, resume: bool = False) -> str:
    """Check a run as `train` would, and return its settings and what would be trained.

    Nothing is written but the cache of the data, and no tracking server is asked.

    Raises:
        OSError: If the run's folder or the data are not what they are to be.
        ValueError: If the settings, the data or the run to resume do not fit together.
    """
    check_start(config, resume)
    validate(config, config.processes, expected_device(config.device, config.processes))
    output = Path(config.output or f"{RUNS}/{config.recipe}-DATE-TIME")
    device = find_device(config.device)
    state = newest_intact(output / "checkpoints")[0] if resume else None
    if state:
        tell_changes(config, state, ALONE)
    task = task_named(config.task)
    splits = task.load(config.data, config.model)
    if state:
        check_trained_on(task, splits.train, state)
    steps, done = steps_per_epoch(config, splits.train), state["engine"]["step_count"] if state else 0
    said = announcement(config, splits, output, device=device, steps_per_epoch=steps, done=done)
    return f"{config_text(config)}\n{said}\n{_network(config, splits)}\nNothing was trained: --dry-run.\n"


def _network(config: RunConfig, splits: Splits) -> str:
    """Make the network and its optimizers without memory for them, and say how large it is."""
    if config.model.needs_engine:
        return f"The network: its {config.model.layer} layer is built when the run begins."
    with torch.device("meta"):
        task = task_named(config.task)
        model = task.build(config.model, task.fingerprint(splits.train))
    check_network(model, config)
    build_optimizers(model, config.optim)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    experts = f"{config.model.num_experts} experts" if config.model.num_experts > 1 else "no mixture"
    return f"The network: {parameters:,} parameters, {experts}"
