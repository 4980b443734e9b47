"""The collectives that expert parallelism needs, with gradients: torch.distributed's own, made differentiable."""

from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup


def all_to_all(
    rows: Float[Tensor, "sent *item"], sent: list[int], received: list[int], group: ProcessGroup
) -> Float[Tensor, "received *item"]:
    """Send ``sent[r]`` consecutive rows to each rank r of a group, and get ``received[r]`` from it, in rank order."""
    exchanged: Tensor = _AllToAll.apply(rows, sent, received, group)  # type: ignore[no-untyped-call]
    return exchanged


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
    dist.all_gather(gathered, counts.contiguous(), group=group)
    return torch.stack(gathered)


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(gradient, ctx.received, ctx.sent, ctx.group), None, None, None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, group: ProcessGroup) -> Tensor:
        ctx.group = group
        return _summed(values, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _summed(gradient, ctx.group), None


class _AllGather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, sizes: list[int], group: ProcessGroup) -> Tensor:
        ctx.sizes, ctx.group = sizes, group
        # As an exchange: gloo's own all_gather wants equal sizes.
        ranks = group.size()
        return _exchange(values.repeat(ranks, *[1] * (values.dim() - 1)), [len(values)] * ranks, sizes, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        own = ctx.sizes[ctx.group.rank()]
        parts = _exchange(gradient, ctx.sizes, [own] * ctx.group.size(), ctx.group)
        return parts.view(ctx.group.size(), own, *gradient.shape[1:]).sum(0), None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    arrived = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(arrived, rows.contiguous(), received, sent, group=group)
    return arrived


def _summed(values: Tensor, group: ProcessGroup) -> Tensor:
    total = values.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total
