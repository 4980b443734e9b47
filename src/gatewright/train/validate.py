"""What is refused before a run begins, and before the processes of one are started."""

import sys
from collections.abc import Mapping
from typing import Any

import torch

from gatewright.data import ImageSet, load_images, local_files
from gatewright.train.build import steps_per_epoch
from gatewright.train.checkpoint.resume import check_changes
from gatewright.train.config import RunConfig
from gatewright.train.device import find_device
from gatewright.train.folder import agreed_state, check_output, check_same_images, own_folder, refuse_a_late_split
from gatewright.train.launch.join import check_devices, check_fit
from gatewright.train.limits import check_network
from gatewright.train.strategies.base import Processes


def check_start(config: RunConfig, resume: bool) -> None:
    """Refuse what shows before anything is opened.

    Raises:
        OSError: If the folder of the run, or that of its data, is not what it has to be.
        ValueError: If experts that begin as one would never be a mixture.
    """
    check_output(config, resume)
    local_files(config.data)
    if not resume:
        refuse_a_late_split(config, 0)


def tell_changes(config: RunConfig, saved: Mapping[str, Any], processes: Processes) -> list[str]:
    """Say once which settings are not those that a run was trained with so far, and return these sentences.

    Raises:
        ValueError: If a run cannot go on with one of them.
    """
    refuse_a_late_split(config, saved["position"]["epoch"])
    said = check_changes(config, saved)
    for sentence in said if processes.rank == 0 else ():
        print(f"resumed: {sentence}", file=sys.stderr)
    return said


def check_trained_on(images: ImageSet, saved: Mapping[str, Any]) -> None:
    """Refuse to go on with other training images than a run began with.

    Raises:
        ValueError: The sentence holds what differs.
    """
    check_same_images(images, saved["class_names"], saved["image_shape"])
    if len(images) != saved.get("num_images", len(images)):  # Checkpoints of version 0.1.0 do not say.
        raise ValueError(
            f"The run was trained on {saved['num_images']} images, and now there are {len(images)}: some would be seen "
            "twice in an epoch, or never. Bring back the images that it began with, or begin another run."
        )


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
        refuse_a_late_split(config, saved["position"]["epoch"])
        check_changes(config, saved)
    images = load_images(config.data).train
    if saved:
        check_trained_on(images, saved)
    steps_per_epoch(config, len(images))
    _check_model(config, images, device)


def _saved(config: RunConfig) -> dict[str, Any] | None:
    with own_folder(config, resume=True) as output:
        return agreed_state(output)


def _check_model(config: RunConfig, images: ImageSet, device: torch.device) -> None:
    if config.model.needs_engine:
        return
    channels, height, width = images.images.shape[1:]
    with torch.device("meta"):
        network = config.model.build((channels, height, width), len(images.class_names))
    check_network(network, config, device)
