"""What the load of the experts says, as pure functions of the sums that a routing carries."""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from gatewright.routing_sums import RoutingSums


def load_share(sums: RoutingSums) -> Float[Tensor, " experts"]:
    """Share of assignments per expert; sums to 1, or to 0 where nothing was routed."""
    counts = sums.tokens_per_expert.to(sums.probs.dtype)
    return counts / counts.sum().clamp(min=1)


def load_cv(sums: RoutingSums) -> Float[Tensor, ""]:
    """Standard deviation of the load over its mean: 0 is even, ``sqrt(experts - 1)`` is one expert alone."""
    return load_share(sums).std(correction=0) * sums.load.shape[0]


def max_over_mean_load(sums: RoutingSums) -> Float[Tensor, ""]:
    """Load of the busiest expert over the mean load: 1 is even, ``experts / top_k`` the worst."""
    return load_share(sums).max() * sums.load.shape[0]


def max_violation(sums: RoutingSums) -> Float[Tensor, ""]:
    """``MaxVio = (max load - mean load) / mean load``, https://arxiv.org/abs/2408.15664 eq. 4; of no load 0."""
    return (max_over_mean_load(sums) - 1).clamp(min=0)


def load_entropy(sums: RoutingSums) -> Float[Tensor, ""]:
    """Entropy of the load in nats: ``log(experts)`` is even, 0 is one expert alone."""
    terms: Tensor = torch.special.entr(load_share(sums))
    return terms.sum()


def router_entropy(sums: RoutingSums) -> Float[Tensor, ""]:
    """Mean entropy of the router's probabilities per token, in nats: 0 is certain of each token."""
    return sums.entropy / sums.num_tokens.clamp(min=1)


def drop_rate(sums: RoutingSums) -> Float[Tensor, ""]:
    """Share of assignments that a capacity limit or expert dropout discarded."""
    dropped, made = (count.to(sums.probs.dtype) for count in (sums.dropped, sums.tokens_per_expert.sum()))
    return dropped / made.clamp(min=1)


def dead_experts(sums: RoutingSums) -> Bool[Tensor, " experts"]:
    """Experts that no token chose."""
    return sums.tokens_per_expert == 0
