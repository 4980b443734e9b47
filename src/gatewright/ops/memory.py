"""Memory of weight gradients that is used again: on a CPU fresh pages cost more than the numbers written to them."""

from typing import Self

import torch
from torch import Tensor

from gatewright.internals import num_holders


class GradientMemory:
    """Keep the memory of the last gradients, and hand it out again once nobody else holds it.

    A training step frees its gradients and asks for as much memory again in the next one. The C library returns such
    large blocks to the system, which zeroes every page before it is written again. Copies and pickles begin with none.
    """

    def __init__(self) -> None:
        self._kept: dict[str, Tensor] = {}

    def empty_like(self, name: str, tensor: Tensor) -> Tensor:
        """Return memory for the gradient of a tensor; on other devices torch itself keeps what was freed."""
        if tensor.device.type != "cpu":
            return torch.empty_like(tensor)
        kept = self._kept.pop(name, None)  # In one step, since another thread may ask too.
        if kept is None or not _alike(kept, tensor) or num_holders(kept) > 1:
            kept = torch.empty_like(tensor)
        gradient, self._kept[name] = kept.detach(), kept
        return gradient

    def __reduce__(self) -> tuple[type[Self], tuple[()]]:
        """Leave the memory out of copies and pickles."""
        return type(self), ()


def _alike(one: Tensor, other: Tensor) -> bool:
    return (one.shape, one.stride(), one.dtype) == (other.shape, other.stride(), other.dtype)
