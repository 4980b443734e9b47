"""The record that passes between the four nouns: a flat list of assignments, and the sums that losses read."""

from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor


@dataclass(frozen=True)
class RoutingSums:
    """What losses and metrics need of a batch, as sums over its tokens.

    Every field is additive: the record of two batches is the sum of their records, so a loss over a global batch is one
    all-reduce of sums.

    Args:
        num_tokens: how many tokens were routed.
        tokens_per_expert: assignments per expert, as the router chose them, before any is dropped.
        importance: Sum of weights per expert, ``Importance(X)`` of https://arxiv.org/abs/1701.06538 eq. 6.
        load: Smooth estimate of the assignments per expert, ``Load(X)`` of the same paper, eq. 10; the count itself
            where the router draws no noise.
        probs: Sum of the router's probabilities over all experts, chosen or not.
        router_z: Sum of ``logsumexp(logits) ** 2``, https://arxiv.org/abs/2202.08906 eq. 5.
        entropy: Sum of the entropies of the router's probabilities, in nats.
        dropped: Assignments discarded by a capacity limit.
    """

    num_tokens: Float[Tensor, ""]
    tokens_per_expert: Float[Tensor, " experts"]
    importance: Float[Tensor, " experts"]
    load: Float[Tensor, " experts"]
    probs: Float[Tensor, " experts"]
    router_z: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    dropped: Float[Tensor, ""]

    def __add__(self, other: Self) -> Self:
        """Add the sums of two batches."""
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def detach(self) -> Self:
        """Return the same sums without their graph."""
        return type(self)(*(getattr(self, field.name).detach() for field in fields(self)))


@dataclass(frozen=True)
class Routing:
    """Who goes where, and how much it counts: a flat list of (token, expert, weight).

    Assignments stand in order of arrival: the first choices of all tokens, then their second choices, and so on. The
    length depends on the router and the number of tokens alone, never on their values: a dropped assignment stays in
    the list with ``expert_index = num_experts`` and weight 0.

    Args:
        token_index: Which token, in ``[0, num_tokens)``.
        expert_index: Which expert, in ``[0, num_experts]``; the last value marks a dropped assignment.
        weight: What multiplies the expert's output for this token; at least float32.
        sums: The batch's additive statistics.
    """

    token_index: Int[Tensor, " assignments"]
    expert_index: Int[Tensor, " assignments"]
    weight: Float[Tensor, " assignments"]
    sums: RoutingSums

    @property
    def num_experts(self) -> int:
        """How many experts the router chose among."""
        return self.sums.load.shape[0]

    def detach(self) -> Self:
        """Return the same routing without its graph."""
        return replace(self, weight=self.weight.detach(), sums=self.sums.detach())

    def drop(self, dropped_mask: Bool[Tensor, " assignments"]) -> Self:
        """Discard the masked assignments; a token that loses all of them gets zero from the layer."""
        return replace(
            self,
            expert_index=self.expert_index.masked_fill(dropped_mask, self.num_experts),
            weight=self.weight.masked_fill(dropped_mask, 0.0),
            sums=replace(self.sums, dropped=self.sums.dropped + dropped_mask.sum()),
        )


def top_k_routing(
    expert_index: Int[Tensor, "tokens top_k"],
    weight: Float[Tensor, "tokens top_k"],
    logits: Float[Tensor, "tokens experts"],
    probs: Float[Tensor, "tokens experts"],
    load: Float[Tensor, "tokens experts"] | None = None,
) -> Routing:
    """Make the record of a router that chooses the same number of experts for every token.

    Args:
        expert_index: Chosen experts, best first.
        weight: Their weights.
        logits: The router's logits without noise.
        probs: Probabilities over all experts that the balance loss and the entropy read; each row sums to 1.
        load: Probability that a token is sent to each expert under fresh noise; by default what was chosen.
    """
    num_tokens, top_k = expert_index.shape
    flat_expert, flat_weight = expert_index.t().reshape(-1), weight.t().reshape(-1)
    zeros = logits.new_zeros(logits.shape[1])
    tokens_per_expert = zeros.index_add(0, flat_expert, torch.ones_like(flat_weight, dtype=zeros.dtype))
    return Routing(
        token_index=torch.arange(num_tokens, device=logits.device).repeat(top_k),
        expert_index=flat_expert,
        weight=flat_weight,
        sums=RoutingSums(
            num_tokens=logits.new_full((), num_tokens),
            tokens_per_expert=tokens_per_expert,
            importance=zeros.index_add(0, flat_expert, flat_weight),
            load=tokens_per_expert if load is None else load.sum(0),
            probs=probs.sum(0),
            router_z=logits.logsumexp(-1).square().sum(),
            entropy=torch.special.entr(probs).sum(),
            dropped=logits.new_zeros(()),
        ),
    )
