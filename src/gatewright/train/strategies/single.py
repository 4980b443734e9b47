"""Strategies by which a run is spread over processes: the interface, and a run on one process.

`ddp.py` has DDP with expert parallelism, `fsdp.py` FSDP2 in place of DDP.
"""

import contextlib
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from gatewright.layers.base import aux_loss, moe_layers
from gatewright.parallel import Rows, whole_state
from gatewright.train.optim import clip_gradients


class WithLosses(nn.Module):
    """A network that returns its auxiliary loss beside its output, so that a wrapper round it sees both."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.has_losses = any(True for _ in moe_layers(network))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and the sum of coefficients times auxiliary losses."""
        output = self.network(inputs)
        return output, aux_loss(self.network) if self.has_losses else output.new_zeros(())


Reduction = Literal["sum", "mean", "max"]
"""The reductions by which an all-reduce combines the values of all processes."""


class Strategy:
    """The strategy for a single process, which has everything; its methods are the interface of all strategies."""

    rank, world_size, local_rank = 0, 1, 0
    mesh: DeviceMesh | None = None
    """The processes as ``(replica, expert)``, where there are several."""
    replicas = 1
    """The number of processes that hold the same expert."""

    def setup(self, model: nn.Module, *, wrap: bool = True) -> nn.Module:
        """Shard a model, and wrap it for training; return the module that returns output and auxiliary loss.

        Args:
            model: The whole model, on every process the same.
            wrap: Whether to add the wrapper that keeps the dense parameters equal.
        """
        return WithLosses(model)

    def shard_batch(self, count: int) -> slice:
        """Return which items of a global batch are this process's."""
        return slice(0, count)

    def no_backward_sync(self, network: nn.Module, *, enabled: bool) -> contextlib.AbstractContextManager[object]:
        """Leave out the all-reduce of gradients in what `setup` returned, for all micro-batches but a step's last."""
        return contextlib.nullcontext()

    def reduce_gradients(self, model: nn.Module) -> None:
        """Make those gradients global that the wrapper of `setup` leaves alone."""

    def clip_gradients(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Scale all gradients down to a total norm over all processes, and return the norm they had."""
        return clip_gradients(model, max_norm)

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum", *, background: bool = False) -> Tensor:
        """Reduce a tensor over all processes in place, and return it.

        Args:
            tensor: One of the same shape on every process.
            op: The reduction.
            background: Whether a thread beside the training asks, which has a process group of its own.
        """
        return tensor

    def all_gather(self, values: list[float]) -> list[list[float]]:
        """Return the values of every process, in the order of the ranks."""
        return [values]

    def barrier(self) -> None:
        """Wait until every process is here."""

    def average_buffers(self, *models: nn.Module) -> None:
        """Average BatchNorm's statistics over the copies of each module, before they are evaluated or saved."""

    def gather_state(
        self, tensors: dict[str, Tensor], model: nn.Module, *, part: bool = False
    ) -> Mapping[str, Tensor | Rows]:
        """Return on the first process the whole of a state that is spread over processes, or each its part."""
        return tensors

    def load_state(self, tensors: Mapping[str, Tensor | Rows], model: nn.Module) -> dict[str, Tensor]:
        """Return what this process needs of a state that was gathered, or saved in parts."""
        return whole_state(tensors)

    def report_steps(self, steps: int) -> None:
        """Let the watchdogs of the other processes know how many optimizer steps this process has made."""


ALONE = Strategy()


def largest(strategy: Strategy, number: int | None, *, background: bool = False) -> int | None:
    """Return the largest number that any process has; None where none has one."""
    if strategy.world_size == 1:
        return number
    found = strategy.all_reduce(torch.tensor(-1 if number is None else number), "max", background=background)
    return None if found < 0 else int(found)
