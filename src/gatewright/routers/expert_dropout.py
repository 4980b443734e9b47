"""Expert dropout: in training any router's assignments are discarded at random."""

from dataclasses import replace

import torch.nn.functional as F
from jaxtyping import Int, Num
from torch import Tensor

from gatewright.routers.base import Router
from gatewright.routing import Routing
from gatewright.scope import ONE_PROCESS, BatchScope, Mask

STREAM = 0x64726F70
"""Noise of its own, apart from whatever streams the router it wraps draws from."""


class ExpertDropout(Router):
    """Discard each of a router's assignments with a probability, and divide the weights of the rest by its complement.

    ``w' = w m / (1 - rate)`` with m of 0 or 1 for each token and expert: dropout over the terms of a token's sum, which
    leaves its expectation as it was. What is discarded is never computed, and counted as dropped. Evaluation is the
    router's own. A token may lose all of its experts.

    Expert output masking (https://arxiv.org/abs/2212.07571) also masks experts' outputs at random, but computes them
    first, keeps the weights, and scales outputs by ``1 - rate`` in evaluation instead. It is not Switch's expert
    dropout, which is dropout inside the experts: see `gatewright.GroupedFeedForward`.

    Sizes and losses are the router's, and so are the sums that losses read: they see what it chose.

    Args:
        router: Any router but another of these.
        rate: Probability of discarding an assignment, at least 0 and below 1.

    Raises:
        ValueError: If the rate is outside ``[0, 1)`` or the router is none, or is wrapped already.
    """

    def __init__(self, router: Router, rate: float) -> None:
        if not isinstance(router, Router):
            raise ValueError(
                f"ExpertDropout discards the assignments of a gatewright.Router; got {type(router).__name__}, which "
                "makes none. Use dropout inside the experts."
            )
        if isinstance(router, ExpertDropout):
            raise ValueError(
                "This router is an ExpertDropout already. Wrap it once: rates a and b are one of 1 - (1 - a) * (1 - b)."
            )
        super().__init__(router.dim, router.num_experts, router.top_k)
        if not 0 <= rate < 1:
            raise ValueError(f"rate is at least 0 and below 1; got {rate}. 0.1 drops one assignment in ten.")
        self.router, self.rate, self.compares_tokens = router, rate, router.compares_tokens
        self.default_losses, self.own_losses = dict(router.default_losses), dict(router.own_losses)

    def forward(
        self, features: Num[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token, and in training discard some assignments, whatever else is in the batch or the list."""
        routing: Routing = self.router(features, scope) if mask is None else self.router(features, scope, mask)
        if not self.training or self.rate == 0:
            return routing
        noise = scope.uniform(routing.weight.new_empty(features.shape[0], self.num_experts), STREAM, mask)
        # An assignment that was not made is not discarded either.
        dropped_mask = F.pad(noise, (0, 1), value=1.0)[routing.token_index, routing.expert_index] < self.rate
        return replace(routing, weight=routing.weight / (1 - self.rate)).drop(dropped_mask)

    def check_replayed(self, expert_index: Int[Tensor, "tokens top_k"]) -> None:
        """Refuse what the router inside refuses."""
        self.router.check_replayed(expert_index)

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return f"{super().extra_repr()}, rate={self.rate}"
