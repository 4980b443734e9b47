"""The device of a run, and its precision."""

import contextlib
from typing import Any

import torch

from gatewright.train.config import Precision

AUTOCAST_DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def find_device(name: str, local_rank: int = 0) -> torch.device:
    """Return a device by its name; ``"auto"`` is a GPU where there is one, each process of a node its own.

    Raises:
        ValueError: If there is no such device here.
    """
    if name == "auto":
        name = f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu"
    try:
        return torch.zeros(1, device=name).cpu().to(name).device  # The meta device, for one, computes nothing.
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"There is no device {name!r} here. Use `device=auto`, or cpu.") from error


def expected_device(name: str, world: int = 1, local_rank: int | None = None) -> torch.device:
    """Return the device that a process is going to find, and leave a GPU alone until it does.

    Args:
        name: The device of the run.
        world: The number of the run's processes.
        local_rank: The number of the process on its machine; None if all of them are to run on this one.

    Raises:
        ValueError: If there is no such device here, or not one for each process.
    """
    if name == "cpu" or not torch.cuda.is_available():
        return find_device(name)
    count, needed = torch.cuda.device_count(), 1 + (world - 1 if local_rank is None else local_rank)
    if world > 1 and ":" in name:
        raise ValueError(f"Each of several processes has a GPU of its own; got `device` {name}. Set `device=cuda`.")
    if world > 1 and needed > count:
        raise ValueError(
            f"This machine has {count} GPUs and was to run at least {needed} processes, each on its own. Start {count} "
            "here, or set `device=cpu`."
        )
    return torch.device("cuda")


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Run the network in half precision where the run asks for it."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision])
