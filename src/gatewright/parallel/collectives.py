"""The collectives that expert parallelism needs, with gradients: torch.distributed's own, made differentiable."""

import contextlib
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup, Work


class Clock:
    """Adds up seconds."""

    def __init__(self) -> None:
        self.seconds = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Add the time that a block takes."""
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds += time.perf_counter() - began


waiting = Clock()
"""Time in which this process did nothing but wait for others and for what they send; on a GPU, what the host waits."""


def all_to_all(
    rows: Float[Tensor, "sent *item"], sent: list[int], received: list[int], group: ProcessGroup
) -> Float[Tensor, "received *item"]:
    """Send ``sent[r]`` consecutive rows to each rank r of a group, and get ``received[r]`` from it, in rank order."""
    arrived, travel = start_all_to_all(rows, sent, received, group)
    travel.wait()
    return arrived


def start_all_to_all(
    rows: Float[Tensor, "sent *item"], sent: list[int], received: list[int], group: ProcessGroup
) -> tuple[Float[Tensor, "received *item"], "Travel"]:
    """Begin an `all_to_all`: the rows may be read once the travel has been waited for."""
    travel = Travel()
    arrived: Tensor = _AllToAll.apply(rows, sent, received, group, travel)  # type: ignore[no-untyped-call]
    return arrived, travel


class Travel:
    """An exchange under way."""

    work: Work | None = None
    rows: Tensor | None = None
    """The rows that are sent, kept until they have been."""

    def wait(self) -> None:
        """Return when all rows have arrived."""
        if self.work is not None:
            with waiting.running():
                self.work.wait()
        self.work = self.rows = None


def all_reduce(values: Tensor, group: ProcessGroup) -> Tensor:
    """Add up over a group. Each rank's gradient reaches every rank's addend."""
    total: Tensor = _AllReduce.apply(values, group)  # type: ignore[no-untyped-call]
    return total


def all_gather(values: Float[Tensor, "tokens *item"], group: ProcessGroup) -> Float[Tensor, "all_tokens *item"]:
    """Concatenate rows over a group in rank order; ranks may have different numbers of them, or none."""
    sizes = gather_counts(torch.tensor([len(values)], device=values.device), group)[:, 0].tolist()
    gathered: Tensor = _AllGather.apply(values, sizes, group)  # type: ignore[no-untyped-call]
    return gathered


def gather_counts(counts: Int[Tensor, " entries"], group: ProcessGroup) -> Int[Tensor, "ranks entries"]:
    """Collect every rank's vector of counts."""
    gathered = [torch.empty_like(counts) for _ in range(group.size())]
    with waiting.running():
        dist.all_gather(gathered, counts.contiguous(), group=group)
    return torch.stack(gathered)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup, travel: Travel
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        arrived = rows.new_empty(sum(received), *rows.shape[1:])
        travel.rows = rows.contiguous()
        travel.work = dist.all_to_all_single(arrived, travel.rows, received, sent, group=group, async_op=True)
        return arrived

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None, None]:
        return all_to_all(gradient, ctx.received, ctx.sent, ctx.group), None, None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        total = values.clone(memory_format=torch.contiguous_format)
        with waiting.running():
            dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce(gradient, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        # As an exchange: gloo's own all_gather wants equal sizes.
        ranks = group.size()
        return all_to_all(values.repeat(ranks, *[1] * (values.dim() - 1)), [len(values)] * ranks, sizes, group)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = ctx.sizes[ctx.group.rank()]
        parts = all_to_all(gradient, ctx.sizes, [own] * ctx.group.size(), ctx.group)
        return parts.view(ctx.group.size(), own, *gradient.shape[1:]).sum(0), None, None
