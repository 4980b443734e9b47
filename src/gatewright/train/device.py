"""Where a run computes, and in which precision."""

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


def autocast(device: torch.device, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Run the network in half precision where the run asks for it."""
    if precision == "float32":
        return contextlib.nullcontext()
    return torch.autocast(device.type, dtype=AUTOCAST_DTYPES[precision])
