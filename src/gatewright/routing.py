"""The record that passes between the four nouns: a list of assignments, with the sums that losses read."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Self

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from gatewright.ops import sort_groups
from gatewright.routing_sums import RoutingSums, Unread
from gatewright.scope import Mask


@dataclass(frozen=True)
class Routing:
    """Who goes where, and how much it counts: a flat list of (token, expert, weight).

    Assignments stand in order of arrival: where tokens choose experts, the first choices of all tokens, then their
    second choices, and so on. The length depends on the router and the number of tokens alone, never on their values:
    an assignment that is dropped, or was not made, stays in the list with ``expert_index = num_experts`` and weight 0.

    Args:
        token_index: Index of the token, in ``[0, num_tokens)``.
        expert_index: Index of the expert, in ``[0, num_experts]``; the last value marks a dropped assignment.
        weight: Weight of the expert's output for this token; at least float32.
        sums: The batch's additive statistics.
        logits: The router's logits of every token, without noise; None where a router of your own leaves them out.
        probs: The router's probabilities over all experts; each row sums to 1. None as above.
        top_k: Experts per token where every token has the same number and none is dropped, so that each of the flat
            lists can be viewed as ``(top_k, tokens)``; None for any other list.
    """

    token_index: Int[Tensor, " assignments"]
    expert_index: Int[Tensor, " assignments"]
    weight: Float[Tensor, " assignments"]
    sums: RoutingSums
    logits: Float[Tensor, "tokens experts"] | None = None
    probs: Float[Tensor, "tokens experts"] | None = None
    top_k: int | None = None

    @property
    def num_experts(self) -> int:
        """How many experts the router chose among."""
        return self.sums.tokens_per_expert.shape[0]

    def with_sums(self, **sums: Tensor | Mapping[str, Tensor]) -> Self:
        """Return the same routing with other sums in place of some."""
        return replace(self, sums=self.sums.replaced(**sums))

    def detach(self) -> Self:
        """Return the same routing without its graph."""
        logits, probs = (None if tensor is None else tensor.detach() for tensor in (self.logits, self.probs))
        return replace(self, weight=self.weight.detach(), sums=self.sums.detach(), logits=logits, probs=probs)

    def drop(self, dropped_mask: Bool[Tensor, " assignments"]) -> Self:
        """Discard the masked assignments; a token that loses all of them gets zero from the layer."""
        kept = replace(
            self,
            expert_index=self.expert_index.masked_fill(dropped_mask, self.num_experts),
            weight=self.weight.masked_fill(dropped_mask, 0.0),
            top_k=None,
        )
        return kept.with_sums(dropped=self.sums.dropped + dropped_mask.sum())

    def by_expert(self) -> tuple[Self, Int[Tensor, " assignments"]]:
        """Sort by expert, arrivals in order within each and dropped assignments last; return the order as well."""
        expert_index, order = sort_groups(self.expert_index, self.num_experts)
        token_index, weight = (values.index_select(0, order) for values in (self.token_index, self.weight))
        grouped = replace(self, token_index=token_index, expert_index=expert_index, weight=weight, top_k=None)
        return grouped, order


def top_k_routing(
    expert_index: Int[Tensor, "tokens top_k"],
    weight: Float[Tensor, "tokens top_k"],
    logits: Float[Tensor, "tokens experts"],
    probs: Float[Tensor, "tokens experts"],
    load: Float[Tensor, "tokens experts"] | None = None,
    mask: Mask = None,
) -> Routing:
    """Make the record of a router that chooses the same number of experts for every token.

    Args:
        expert_index: Chosen experts, best first.
        weight: Their weights.
        logits: The router's logits without noise.
        probs: Probabilities over all experts that the balance loss and the entropy read; each row sums to 1.
        load: Probability that a token is sent to each expert under fresh noise; by default what was chosen.
        mask: True where a token is real. The others keep their places in the list, as assignments that were not made,
            and have no part in the sums.
    """
    top_k = expert_index.shape[1]
    routing = flat_routing(*_by_choice(expert_index, weight), logits, probs, load, mask)
    return replace(routing, top_k=top_k if mask is None else None)


def summed_routing(
    expert_index: Int[Tensor, "tokens top_k"],
    weight: Float[Tensor, "tokens top_k"],
    mask: Mask = None,
    *,
    probs: Float[Tensor, " experts"],
    router_z: Float[Tensor, ""],
    entropy: Float[Tensor, ""],
) -> Routing:
    """Make the record that `top_k_routing` does where only the sums are at hand, not every token's probabilities.

    Args:
        expert_index: Chosen experts, best first.
        weight: Their weights.
        mask: The mask, as in `top_k_routing`.
        probs: Sum of the probabilities of real tokens, as are the other sums; see `RoutingSums`.
        router_z: Sum of the squared log-sum-exp of the logits.
        entropy: Sum of the entropies of the probabilities, in nats.
    """
    num_tokens, top_k = expert_index.shape
    flat = _by_choice(expert_index, weight)
    sums = {"probs": probs, "router_z": router_z, "entropy": entropy}
    routing = _record(*flat, num_tokens, mask, probs.shape[0], {}, **sums)
    return replace(routing, top_k=top_k if mask is None else None)


def flat_routing(
    token_index: Int[Tensor, " assignments"],
    expert_index: Int[Tensor, " assignments"],
    weight: Float[Tensor, " assignments"],
    logits: Float[Tensor, "tokens experts"],
    probs: Float[Tensor, "tokens experts"],
    load: Float[Tensor, "tokens experts"] | None = None,
    mask: Mask = None,
) -> Routing:
    """Make the record of any list of assignments; those not made have ``expert_index = num_experts`` and weight 0.

    Args:
        token_index: Index of the token.
        expert_index: Index of the expert.
        weight: Weight of the expert's output.
        logits: The router's logits, as in `top_k_routing`.
        probs: The probabilities, as in `top_k_routing`.
        load: The load, as in `top_k_routing`.
        mask: The mask, as in `top_k_routing`.
    """
    routing = _record(
        token_index,
        expert_index,
        weight,
        logits.shape[0],
        mask,
        logits.shape[1],
        {
            "probs": (_total, (probs, mask)),
            "router_z": (_router_z, (logits, mask)),
            "entropy": (_entropy, (probs, mask)),
            **({} if load is None else {"load": (_total, (load, mask))}),
        },
    )
    return replace(routing, logits=logits, probs=probs)


def _by_choice(expert_index: Tensor, weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return tokens, experts and weights in order of arrival: first choices, then second ones, and so on."""
    num_tokens, top_k = expert_index.shape
    token_index = torch.arange(num_tokens, device=expert_index.device).repeat(top_k)
    return token_index, expert_index.t().reshape(-1), weight.t().reshape(-1)


def _record(
    token_index: Tensor,
    expert_index: Tensor,
    weight: Tensor,
    num_tokens: int,
    mask: Mask,
    num_experts: int,
    unread: Unread,
    **known: Tensor,
) -> Routing:
    """Count the assignments of a list, of which those of masked tokens are not made."""
    if mask is not None:
        masked = ~mask[token_index]
        expert_index, weight = expert_index.masked_fill(masked, num_experts), weight.masked_fill(masked, 0.0)
    tokens_per_expert = _per_expert(torch.ones_like(expert_index), expert_index, num_experts)
    count = partial(torch.full, (), dtype=torch.int64, device=weight.device)
    later: Unread = {
        "importance": (_per_expert, (weight, expert_index, num_experts)),
        "load": (_as_floats, (tokens_per_expert, weight)),
        "dropped": (count, (0,)),
        **unread,
    }
    made = {"num_tokens": count(num_tokens) if mask is None else mask.sum(), "tokens_per_expert": tokens_per_expert}
    sums = RoutingSums.when_read(later, **made, **known)
    return Routing(token_index, expert_index, weight, sums)


def real_only(values: Num[Tensor, "tokens *item"], mask: Mask, other: float = 0) -> Num[Tensor, "tokens *item"]:
    """Put another value, such as 0, in place of what is not a real token's; without a mask all are."""
    return values if mask is None else values.masked_fill(~mask.view(-1, *[1] * (values.dim() - 1)), other)


def entropies(probs: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
    """Return ``-p log p``, which is 0 for 0; `torch.special.entr` takes four times as long on a CPU."""
    return -probs * probs.clamp(min=torch.finfo(probs.dtype).tiny).log()


def _total(values: Tensor, mask: Mask) -> Float[Tensor, " experts"]:
    return real_only(values, mask).sum(0)


def _router_z(logits: Tensor, mask: Mask) -> Float[Tensor, ""]:
    return real_only(logits.logsumexp(-1).square(), mask).sum()


def _entropy(probs: Tensor, mask: Mask) -> Float[Tensor, ""]:
    return real_only(entropies(probs), mask).sum()


def _as_floats(counts: Tensor, weight: Tensor) -> Float[Tensor, " experts"]:
    return counts.to(weight.dtype)


def _per_expert(values: Tensor, expert_index: Tensor, num_experts: int) -> Num[Tensor, " experts"]:
    """Add up values by expert, without those of assignments that were not made."""
    if torch.compiler.is_compiling() and values.is_cuda:  # Adding up in place would queue for the same few numbers.
        own = expert_index[:, None] == torch.arange(num_experts, device=values.device)
        return torch.where(own, values[:, None], 0).sum(0)
    sums = values.new_zeros(num_experts + 1).index_add(0, expert_index, values)
    return sums[:-1].clone()  # A view would confuse torch.compile where its detached twin is kept as well.
