"""The back-ends of the fused feed-forward: which there are, which input each takes, and why not."""

import importlib
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol, cast, runtime_checkable

import torch
from torch import Tensor

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
"""Found once, since torch.compile cannot trace a search for a module."""


@runtime_checkable
class Kernels(Protocol):
    """The five kernels of a back-end; `gatewright.kernels.plain` says what each computes."""

    up: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, str, Tensor | None], Tensor]
    grouped: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    gather_sum: Callable[[Tensor, Tensor], Tensor]
    down_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, str], tuple[Tensor, Tensor, Tensor]]
    weight_gradient: Callable[[Tensor, Tensor, Tensor, Tensor, str, Tensor], Tensor]


@dataclass(frozen=True)
class Backend:
    """One way to compute the fused feed-forward.

    Args:
        module: Where its kernels are; it is imported when they are first used.
        missing: Says why the back-end cannot run in this process, or None.
        refuses: Says why it does not take such items, or None.
        transposed: Whether its kernels take transposed views of matrices; for the others they are copied.
    """

    module: str
    missing: Callable[[], str | None]
    refuses: Callable[[Tensor], str | None]
    transposed: bool = False

    def kernels(self) -> Kernels:
        """Import the kernels."""
        return cast(Kernels, importlib.import_module(self.module))


def backends() -> None:
    """Print the back-ends of `gatewright.GroupedFeedForward` in order of preference, and why one is not available."""
    for name, backend in BACKENDS.items():
        print(f"{name:<8}{backend.missing() or 'available'}")


def choose_backend(x: Tensor, name: str | None) -> str:
    """Return the name given, or of the first back-end that takes such items.

    Raises:
        ValueError: If the back-end given does not take them.
    """
    if name is None:
        return next(each for each in BACKENDS if _reason(each, x) is None)
    if reason := _reason(name, x):
        raise ValueError(f"backend={name!r} does not take this input: {reason}. Leave backend out, or choose another.")
    return name


def _reason(name: str, x: Tensor) -> str | None:
    return BACKENDS[name].missing() or BACKENDS[name].refuses(x)


def _no_triton() -> str | None:
    if not TRITON_INSTALLED:
        return "Triton is not installed (pip install triton)"
    if not torch.cuda.is_available():
        return "there is no CUDA device"
    return None


def _triton_refuses(x: Tensor) -> str | None:
    if x.device.type != "cuda":
        return f"its items are on a CUDA device; got {x.device.type}"
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"its items are bfloat16 or float16; got {x.dtype}"
    device = torch.cuda.get_device_properties(x.device)
    if device.major not in (9, 10):
        return f"its tiles take the shared memory of an H100 or B200; got {device.name}"
    return None


# No mapping proxy: torch.compile cannot read one in a graph in which any dict has changed.
BACKENDS: Mapping[str, Backend] = {
    "triton": Backend("gatewright.kernels.launch", _no_triton, _triton_refuses),
    "torch": Backend("gatewright.kernels.plain", lambda: None, lambda x: None, transposed=True),
}
"""Every back-end by name, in order of preference."""
