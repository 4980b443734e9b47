"""Dispatch with a capacity: in training each expert takes a bounded number of rows, and the rest are dropped."""

import math
import sys
import warnings
from fractions import Fraction
from typing import Literal, TypeVar, get_args

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from gatewright.dispatch.base import Dispatcher, ExpertBatch, group_by_expert
from gatewright.routing import Routing

Count = TypeVar("Count", int, Tensor)
Priority = Literal["arrival", "largest-weight", "total-weight"]

PRIORITY_BITS = 16
"""Bits after the binary point to which priorities are compared; beyond these, tokens are served by arrival."""


class Capacity(Dispatcher):
    """Give every expert ``max(min_capacity, ceil(assignments / num_experts * capacity_factor))`` rows in training.

    Capacity as in https://arxiv.org/abs/2101.03961 eq. 3. What is dropped is counted in the routing's sums. Evaluation
    drops nothing.

    Args:
        capacity_factor: Room over the even share; 1.0 to 1.25 is usual.
        min_capacity: Least rows per expert, whatever the factor says.
        priority: Order in which tokens are served where room is short, all first choices before all second ones:
            ``"arrival"`` is batch order (GShard's); ``"largest-weight"`` and ``"total-weight"`` are batch-prioritised
            routing, by a token's largest weight or the sum of its weights (https://arxiv.org/abs/2106.05974 section 4).

    Raises:
        ValueError: If the factor is not finite and positive, min_capacity is below 1 or priority is unknown.
    """

    def __init__(
        self,
        capacity_factor: float = 1.25,
        min_capacity: int = 4,
        priority: Priority = "arrival",
    ) -> None:
        if not 0 < capacity_factor < math.inf or min_capacity < 1:
            raise ValueError(
                f"capacity_factor is finite and above 0 and min_capacity at least 1; got {capacity_factor} and "
                f"{min_capacity}. For no limit at all use Dropless()."
            )
        if priority not in get_args(Priority):
            raise ValueError(f"priority is 'arrival', 'largest-weight' or 'total-weight'; got {priority!r}.")
        self.capacity_factor, self.min_capacity, self.priority = capacity_factor, min_capacity, priority
        # Capacities are counted in whole numbers, because 20 / 3 * 1.05 comes to 7.000000000000001.
        self._ratio = Fraction(capacity_factor).limit_denominator(10**6).as_integer_ratio()
        self._warned = False

    def capacity(self, num_assignments: Count, num_experts: int) -> Count:
        """Return how many rows each expert takes."""
        factor, divisor = self._ratio
        rows = -(-num_assignments * factor // (num_experts * divisor))
        return rows.clamp(min=self.min_capacity) if isinstance(rows, Tensor) else max(rows, self.min_capacity)

    def dispatch(self, x: Float[Tensor, "tokens *item"], routing: Routing, *, training: bool) -> ExpertBatch:
        """Drop what exceeds the capacity, in training only, and group the rest by expert."""
        if training:
            self._warn_of_one_row(routing.weight.shape[0], routing.num_experts)
            capacity = self.capacity(routing.sums.tokens_per_expert.sum(), routing.num_experts)
            routing = routing.drop(self._over(routing, capacity, x.shape[0]))
        return group_by_expert(x, routing)

    def keeps_all(self, *, training: bool) -> bool:
        """Evaluation drops nothing."""
        return not training

    def _over(self, routing: Routing, capacity: Int[Tensor, ""], num_tokens: int) -> Bool[Tensor, " assignments"]:
        """Mark every assignment that finds its expert full."""
        served = self._served(routing, num_tokens)
        order = served[routing.expert_index[served].argsort(stable=True)]
        expert = routing.expert_index[order]
        return torch.zeros_like(expert, dtype=torch.bool).index_put(
            (order,), (_place_in_run(expert) >= capacity) & (expert < routing.num_experts)
        )

    def _served(self, routing: Routing, num_tokens: int) -> Int[Tensor, " assignments"]:
        """Put the assignments in the order in which they are served."""
        token = routing.token_index
        if self.priority == "arrival":
            return torch.arange(token.shape[0], device=token.device)
        reduce = "amax" if self.priority == "largest-weight" else "sum"
        weight = routing.weight.detach()
        priority = weight.new_zeros(num_tokens).scatter_reduce(0, token, weight, reduce)[token]
        # Normalised weights are to tie, though their sums differ by rounding.
        priority = (priority * 2**PRIORITY_BITS).round()
        by_token = token.argsort(stable=True)
        choice = torch.empty_like(token).index_put((by_token,), _place_in_run(token[by_token]))
        served: Tensor = priority.argsort(descending=True, stable=True)
        return served[choice[served].argsort(stable=True)]

    def _warn_of_one_row(self, num_assignments: int, num_experts: int) -> None:
        # A warning cannot be traced, and would break a graph that was to be one.
        if torch.compiler.is_compiling() or self._warned or num_assignments < 2:
            return
        if self.capacity(num_assignments, num_experts) > 1:
            return
        self._warned = True
        factor = math.ceil(20 * num_experts / num_assignments) / 10
        warnings.warn(
            f"A capacity of 1 row per expert ({num_assignments} assignments over {num_experts} experts, "
            f"capacity_factor {self.capacity_factor}) drops most of the batch. Set capacity_factor={factor} for 2 rows "
            "or more, a larger min_capacity or batch, or use Dropless().",
            stacklevel=_level_of_caller(),
        )

    def __repr__(self) -> str:
        """Show the settings when a layer is printed."""
        return f"Capacity({self.capacity_factor}, min_capacity={self.min_capacity}, priority={self.priority!r})"


def _level_of_caller() -> int:
    """Count the frames from the one that asks to the first outside Gatewright and torch, which ran the layer."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] in ("gatewright", "torch"):
        frame, level = frame.f_back, level + 1
    return level


def _place_in_run(values: Int[Tensor, " sorted"]) -> Int[Tensor, " sorted"]:
    """Number the entries of each run of equal values from 0."""
    return torch.arange(values.shape[0], device=values.device) - torch.searchsorted(values, values)
