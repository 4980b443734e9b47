"""Soft dispatch: experts run on weighted means of tokens, and tokens get weighted means of their outputs."""

from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.dispatch.base import Dispatcher, ExpertBatch
from gatewright.routing import SoftRouting


class SoftDispatch(Dispatcher):
    """Fill every slot with a mean of all tokens, and return to every token a mean of all slots' outputs.

    ``D^T X`` and ``C Y`` of https://arxiv.org/abs/2308.00951 eqs. 1 and 2; nothing is dropped. Where a group is spread
    over processes, each of them fills the same slots: with the sum of what all of them put in.
    """

    dense: ClassVar[bool] = True

    def dispatch(self, x: Float[Tensor, "tokens *item"], routing: SoftRouting, *, training: bool) -> ExpertBatch:
        """Make one row per expert, group and slot, in this order; the same in training and evaluation."""
        groups, group_tokens, experts, slots = routing.dispatch.shape
        (rows,) = routing.scope.sum(
            _weigh("gtes,gt...->egs...", routing.dispatch, x.unflatten(0, (groups, group_tokens)))
        )
        tokens_per_expert = torch.full((experts,), groups * slots, device=x.device)
        return ExpertBatch(rows.flatten(0, 2), tokens_per_expert, routing)

    def combine(
        self, rows: Float[Tensor, "slots *out"], batch: ExpertBatch, num_tokens: int
    ) -> Float[Tensor, "num_tokens *out"]:
        """Add up all slots' outputs for each token, times their weights, in at least float32."""
        assert isinstance(batch.routing, SoftRouting)
        groups, _, experts, slots = batch.routing.combine.shape
        by_slot = rows.unflatten(0, (experts, groups, slots))
        return _weigh("gtes,egs...->gt...", batch.routing.combine, by_slot).flatten(0, 1)

    def __repr__(self) -> str:
        """Show the dispatcher when a layer is printed."""
        return "SoftDispatch()"


def _weigh(equation: str, weight: Tensor, values: Tensor) -> Tensor:
    """Contract in at least float32, also under autocast, and return the values' own type."""
    dtype = torch.promote_types(weight.dtype, values.dtype)
    with torch.autocast(values.device.type, enabled=False):
        return torch.einsum(equation, weight.to(dtype), values.to(dtype)).to(values.dtype)
