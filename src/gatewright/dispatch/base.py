"""The trip to the experts and back: rows grouped by expert, then a weighted sum per token."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatewright.ops import in_memory_format
from gatewright.routing import Routing


@dataclass(frozen=True)
class ExpertBatch:
    """Rows grouped by expert, in the order of `tokens_per_expert`; rows of dropped assignments stand last.

    It carries all that `combine` needs, so a dispatcher keeps no state and can be used again in between.

    Args:
        rows: One row per assignment.
        tokens_per_expert: Number of rows of each expert; their sum is less than the rows where some were dropped.
        routing: The assignments, in the same order as the rows.
    """

    rows: Float[Tensor, "assignments *item"]
    tokens_per_expert: Int[Tensor, " experts"]
    routing: Routing


class Dispatcher(ABC):
    """Brings tokens to experts and their outputs back. Not a module: it has no parameters and keeps no state."""

    @abstractmethod
    def dispatch(self, x: Float[Tensor, "tokens *item"], routing: Routing, *, training: bool) -> ExpertBatch:
        """Make the experts' rows of the tokens, one per assignment, grouped by expert.

        With `training` false nothing may be dropped: a prediction never depends on what else is in the batch.
        """

    def keeps_all(self, *, training: bool) -> bool:
        """Whether all assignments reach their experts in this process, so that these may be given the tokens."""
        return False

    def arrive(self, batch: ExpertBatch) -> ExpertBatch:
        """Wait for rows that are on their way; what a layer computes before this, it computes while they travel."""
        return batch

    def combine(
        self, rows: Float[Tensor, "assignments *out"], batch: ExpertBatch, num_tokens: int
    ) -> Float[Tensor, "num_tokens *out"]:
        """Add up each token's rows, times their weights, in at least float32."""
        weight = batch.routing.weight.reshape(-1, *[1] * (rows.dim() - 1))
        weighted = rows * weight

        def add(rows: Tensor) -> Tensor:
            total = rows.new_zeros(num_tokens, *rows.shape[1:])
            return total.index_add(0, batch.routing.token_index, rows)

        return in_memory_format(add, weighted).to(rows.dtype)


def group_by_expert(x: Float[Tensor, "tokens *item"], routing: Routing) -> ExpertBatch:
    """Gather one row per assignment; experts in order, arrivals in order within each, dropped assignments last."""
    grouped, _ = routing.by_expert()
    rows = in_memory_format(lambda items: items.index_select(0, grouped.token_index), x)
    return ExpertBatch(rows, count(grouped), grouped)


def count(routing: Routing) -> Int[Tensor, " experts"]:
    """Count the assignments of each expert that were not dropped."""
    counts = routing.expert_index.new_zeros(routing.num_experts + 1)
    return counts.index_add(0, routing.expert_index, torch.ones_like(routing.expert_index))[:-1]
