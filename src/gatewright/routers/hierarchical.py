"""Two-level noisy top-k gating: a group first, then experts within it: https://arxiv.org/abs/1701.06538 appendix B."""

import warnings
from dataclasses import dataclass
from types import MappingProxyType
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewright.losses import cv_squared
from gatewright.ops import stable_sort
from gatewright.routers.base import MIN_NOISE_STD, Router, largest, load_probability, size_of_groups
from gatewright.routers.gate import Gate, gate_logits
from gatewright.routing import Routing, real_only, top_k_routing
from gatewright.routing_sums import RoutingSums
from gatewright.scope import ONE_PROCESS, BatchScope, Mask

LEVEL_HINT = (
    "Hierarchical with {} normalises the one chosen weight to 1, so the {} gate gets no gradient from the task and "
    "learns from the balance losses alone. Use {}."
)


@dataclass(frozen=True)
class Noisy:
    """One level's logits, clean and with noise of a deviation; without noise both are the same."""

    logits: Float[Tensor, "tokens gates choices"]
    noisy: Float[Tensor, "tokens gates choices"]
    std: Float[Tensor, "tokens gates choices"]

    def of(self, index: Int[Tensor, "tokens top_k"]) -> Self:
        """Take some of the gates for every token."""
        index = index[:, :, None].expand(-1, -1, self.logits.shape[-1])
        return type(self)(self.logits.gather(1, index), self.noisy.gather(1, index), self.std.gather(1, index))

    def load(self, top_k: int) -> Float[Tensor, "tokens gates choices"]:
        """Probability that each choice is among the top k of its gate under fresh noise of its own."""
        return load_probability(self.logits, self.noisy, self.std, top_k)


class NoisyGates(nn.Module):
    """One level: noisy gates side by side, both matrices zero at first; gates of a single choice have none.

    Args:
        dim: Size of the features.
        num_gates: Number of gates, which choose independently.
        num_choices: Number of choices of each gate.
        bias: Whether the gates add a bias, beside their noise.
    """

    def __init__(self, dim: int, num_gates: int, num_choices: int, *, bias: bool = False) -> None:
        super().__init__()
        self.num_gates, self.num_choices = num_gates, num_choices
        self.gate: nn.Module | None = None
        if num_choices > 1:
            self.gate = Gate(dim, num_gates * num_choices, bias=bias)
            self.noise = Gate(dim, num_gates * num_choices, bias=False)

    def forward(
        self,
        features: Float[Tensor, "tokens dim"],
        scope: BatchScope,
        mask: Mask,
        stream: int,
    ) -> Noisy:
        """Return the logits, https://arxiv.org/abs/1701.06538 eq. 4; with noise in training only."""
        shape = (features.shape[0], self.num_gates, self.num_choices)
        if self.gate is None:
            certain = features.new_zeros(shape, dtype=torch.promote_types(features.dtype, torch.float32))
            return Noisy(certain, certain, certain)
        logits = gate_logits(features, self.gate)
        if not self.training:
            return Noisy(logits.view(shape), logits.view(shape), torch.zeros_like(logits).view(shape))
        std = F.softplus(gate_logits(features, self.noise)).clamp(min=MIN_NOISE_STD)
        noisy = logits + std * scope.normal(logits, stream, mask)
        return Noisy(logits.view(shape), noisy.view(shape), std.view(shape))


def expert_load(sums: RoutingSums) -> Float[Tensor, " experts"]:
    """``Load_H(X)_ij = Load_primary(X)_i Load_i(X_i)_j / |X_i|``: https://arxiv.org/abs/1701.06538 appendix B.

    The product keeps a gradient to the upper level. It is 0 in a group that no token chose.
    """
    group_load, group_tokens = sums.extra["group_load"], sums.extra["group_tokens"]
    per_token = sums.load.view(len(group_load), -1) / group_tokens.clamp(min=1)[:, None]
    return (group_load[:, None] * per_token).flatten()


def load_loss(sums: RoutingSums) -> Float[Tensor, ""]:
    """``CV(Load(X)) ** 2`` of both levels: https://arxiv.org/abs/1701.06538 eq. 11."""
    return cv_squared(expert_load(sums))


class Hierarchical(Router):
    """Choose groups of experts by one noisy top-k gate, and experts in each chosen group by another of its own.

    https://arxiv.org/abs/1701.06538 appendix B: expert j of group i has weight ``G_primary(x)_i G_i(x)_j``, each
    factor as in `NoisyTopK`. All matrices start at zero, and a level with nothing to choose has none: with one group,
    or with groups of one expert, this is `NoisyTopK`. An expert's load is its group's, times the mean of its own over
    the tokens that chose the group.

    Probabilities are the products of both levels' softmaxes; ``router_z`` is of the sums of both levels' logits.

    Args:
        dim: Size of the features a token is routed by.
        num_experts: Number of experts; group i has those from ``i * num_experts / num_groups`` on.
        top_k: Experts per token: ``top_k / top_k_groups`` in each chosen group.
        num_groups: Number of groups, of equal size.
        top_k_groups: Groups per token; by default 2 as in the paper, or 1 where there is one.
        gate_bias: Whether every gate adds a bias, zero at first, as gpt-oss's does; the paper's have none.

    Raises:
        ValueError: If sizes do not fit: groups of equal size, no more of them chosen than there are, and top_k shared
            out equally among those chosen.
    """

    default_losses = MappingProxyType({"importance": 0.1, "load": 0.1})
    own_losses = MappingProxyType({"load": load_loss})

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 4,
        *,
        num_groups: int = 1,
        top_k_groups: int | None = None,
        gate_bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        self.num_groups, self.top_k_groups = num_groups, min(2, num_groups) if top_k_groups is None else top_k_groups
        self._check_sizes()
        self.top_k_in_group = top_k // self.top_k_groups
        if self.top_k_groups == 1 < num_groups:
            warnings.warn(LEVEL_HINT.format("one group per token", "primary", "top_k_groups=2"), stacklevel=2)
        if self.top_k_in_group == 1 < self.group_size:
            remedy = f"top_k={2 * self.top_k_groups}"
            warnings.warn(LEVEL_HINT.format("one expert per chosen group", "secondary", remedy), stacklevel=2)
        self.primary = NoisyGates(dim, 1, num_groups, bias=gate_bias)
        self.secondary = NoisyGates(dim, num_groups, self.group_size, bias=gate_bias)

    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token, with noise of both levels in training only."""
        primary, secondary = (
            level(features, scope, mask, stream) for stream, level in ((1, self.primary), (0, self.secondary))
        )
        group_index = largest(primary.noisy[:, 0], self.top_k_groups)
        index_in_group = largest(secondary.of(group_index).noisy, self.top_k_in_group)
        by_group = scope.chosen((group_index[:, :, None] * self.group_size + index_in_group).flatten(1))
        by_group = by_group.unflatten(1, index_in_group.shape[1:])  # as it was, or replayed
        group_index, index_in_group = by_group[:, :, 0] // self.group_size, by_group % self.group_size
        chosen = secondary.of(group_index)
        group_weight = primary.noisy[:, 0].gather(-1, group_index).softmax(-1)
        weight = (group_weight[:, :, None] * chosen.noisy.gather(-1, index_in_group).softmax(-1)).flatten(1)
        best, order = stable_sort(weight, descending=True)
        logits = (primary.logits.mT + secondary.logits).flatten(1)
        probs = (primary.logits.softmax(-1).mT * secondary.logits.softmax(-1)).flatten(1)
        is_chosen = torch.zeros_like(primary.logits[:, 0], dtype=torch.int64).scatter(1, group_index, 1)
        load, group_load = None, is_chosen
        if self.training:
            load, group_load = self._load(chosen, group_index).to(probs), primary.load(self.top_k_groups)[:, 0]
        routing = top_k_routing(by_group.flatten(1).gather(1, order), best, logits, probs, load, mask)
        per_group = {"group_load": group_load.to(probs), "group_tokens": is_chosen}
        return routing.with_sums(extra={name: real_only(each, mask).sum(0) for name, each in per_group.items()})

    def check_replayed(self, expert_index: Int[Tensor, "tokens top_k"]) -> None:
        """Refuse experts that are not group by group, the same number of each."""
        group = expert_index.unflatten(1, (self.top_k_groups, self.top_k_in_group)) // self.group_size
        first = group[:, :, 0].sort(1).values
        if (group != group[:, :, :1]).any() or (first[:, 1:] == first[:, :-1]).any():
            raise ValueError(
                f"Hierarchical replays {self.top_k_in_group} experts of one group, then as many of the next one, "
                f"{self.top_k_groups} groups of {self.group_size} experts in all. Record the routing from a router of "
                "the same groups."
            )

    def _load(self, chosen: Noisy, group_index: Int[Tensor, "tokens top_k"]) -> Float[Tensor, "tokens experts"]:
        """Probability that each expert of the chosen groups is sent a token under fresh noise; 0 in the others."""
        load = chosen.load(self.top_k_in_group)
        every = load.new_zeros(load.shape[0], self.num_groups, self.group_size)
        return every.scatter(1, group_index[:, :, None].expand_as(load), load).flatten(1)

    def _check_sizes(self) -> None:
        chosen = self.top_k_groups
        self.group_size = size_of_groups(self.num_experts, self.num_groups, chosen)
        if self.top_k % chosen or self.top_k // chosen > self.group_size:
            raise ValueError(
                f"A token takes the same number of experts, of {self.group_size} that there are, from each of {chosen} "
                f"groups: top_k is a multiple of top_k_groups up to {chosen * self.group_size}; got {self.top_k}. "
                "Change top_k, num_groups or top_k_groups."
            )

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return f"{super().extra_repr()}, num_groups={self.num_groups}, top_k_groups={self.top_k_groups}"
