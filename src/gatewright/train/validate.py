"""What is refused before a run begins, and before the processes of one are started."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from gatewright.tasks import Task, task_named
from gatewright.train.build import steps_per_epoch
from gatewright.train.checkpoint.resume import check_changes, saved_fingerprint
from gatewright.train.config import RunConfig
from gatewright.train.device import find_device
from gatewright.train.folder import agreed_state, check_output, own_folder, refuse_a_late_upcycling
from gatewright.train.launch.join import check_devices, check_fit
from gatewright.train.limits import check_network
from gatewright.train.strategies.single import Strategy


def check_start(config: RunConfig, resume: bool) -> None:
    """Refuse what shows before anything is opened.

    Raises:
        OSError: If the folder of the run, or that of its data, is not what it has to be.
        ValueError: If the dense network that a run begins with would never become a mixture.
    """
    check_output(config, resume)
    task_named(config.task).check_data(config.data)
    if not resume:
        refuse_a_late_upcycling(config, 0)


def tell_changes(config: RunConfig, saved: Mapping[str, Any], strategy: Strategy) -> list[str]:
    """Say once which settings are not those that a run was trained with so far, and return these sentences.

    Raises:
        ValueError: If a run cannot go on with one of them.
    """
    refuse_a_late_upcycling(config, saved["position"]["epoch"])
    said = check_changes(config, saved)
    for sentence in said if strategy.rank == 0 else ():
        print(f"resumed: {sentence}", file=sys.stderr)
    return said


def check_trained_on(task: Task, part: Any, saved: Mapping[str, Any]) -> None:
    """Refuse to go on with other training data than a run began with.

    Raises:
        ValueError: The sentence holds what differs.
    """
    task.check(task.fingerprint(part), saved_fingerprint(saved))


def check_processes(config: RunConfig, *, resume: bool) -> None:
    """Refuse, before any process starts, all that each of them would refuse.

    Raises:
        OSError: If the folder of the run, or that of its data, is not what it has to be.
        ValueError: If the settings, the data or the run to resume do not fit together.
    """
    check_start(config, resume)
    check_fit(config, config.processes)
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    check_devices(config, config.processes - 1, on_gpu)
    # On a GPU the processes find theirs, and this one leaves it alone.
    device = torch.device("cuda") if on_gpu else find_device(config.device)
    saved = _saved(config) if resume else None
    if saved:
        refuse_a_late_upcycling(config, saved["position"]["epoch"])
        check_changes(config, saved)
    task = task_named(config.task)
    part = task.load(config.data, config.model).train
    if saved:
        check_trained_on(task, part, saved)
    steps_per_epoch(config, part)
    if config.model.layer != "deepspeed":  # It asks DeepSpeed for a device, which is the processes' to have.
        with torch.device("meta"):
            model = task.build(config.model, task.fingerprint(part))
        check_network(model, config, device)


def _saved(config: RunConfig) -> dict[str, Any] | None:
    with own_folder(config, resume=True) as output:
        return agreed_state(output)
