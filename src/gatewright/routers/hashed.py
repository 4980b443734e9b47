"""Hash routing: a token's expert is a fixed function of an integer key, and nothing is learned."""

import torch
from jaxtyping import Int, Integer
from torch import Tensor

from gatewright.routers.base import Router
from gatewright.routing import Routing, top_k_routing
from gatewright.scope import ONE_PROCESS, BatchScope, Mask, noise_key, splitmix64


class Hashed(Router):
    """Send each token to the k experts of the largest hash of (seed, key, expert), each with weight 1 / k.

    Random hashing of https://arxiv.org/abs/2106.04426, where the key is a token's id: the honest control for whether
    learned routing helps. The same key goes to the same experts always, in training and evaluation, in any
    batch and on any machine. Choosing by the largest hash (https://doi.org/10.1109/90.663936) gives every set of k
    experts the same chance; one more expert takes over its share of the keys and moves no other.

    The layer hands keys over as features: ``moe(x, features=keys)``. It has no parameters and needs no losses.

    Args:
        dim: Number of integers in a token's key; they are hashed together, in order.
        num_experts: Number of experts.
        top_k: Experts per token.
        seed: Seed of the hash; another one gives an unrelated assignment.

    Raises:
        ValueError: If top_k is above num_experts or a size is below 1; in forward, if features are not integers.
    """

    def __init__(self, dim: int, num_experts: int, top_k: int = 1, *, seed: int = 0) -> None:
        super().__init__(dim, num_experts, top_k)
        self.seed, self._key = seed, noise_key(seed)

    def forward(
        self, features: Integer[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token by its key; nothing is random, so the scope has no part in it."""
        if features.is_floating_point():
            raise ValueError(
                f"Hashed routes by integer keys; pass them as moe(x, features=keys). Got features of {features.dtype}."
            )
        expert_index = self._hashes(features).topk(self.top_k).indices
        logits = torch.zeros(features.shape[0], self.num_experts, dtype=torch.float32, device=features.device)
        weight = torch.full_like(expert_index, 1 / self.top_k, dtype=torch.float32)
        return top_k_routing(expert_index, weight, logits, logits.scatter(1, expert_index, weight), mask=mask)

    def _hashes(self, keys: Integer[Tensor, "tokens dim"]) -> Int[Tensor, "tokens experts"]:
        """Hash one number after the other into what came before; no two experts of a key get the same."""
        hashed = torch.full_like(keys[:, 0], self._key, dtype=torch.int64)
        for column in keys.to(torch.int64).unbind(1):
            hashed = splitmix64(hashed ^ column)
        return splitmix64(hashed[:, None] ^ torch.arange(self.num_experts, device=keys.device))

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return f"{super().extra_repr()}, seed={self.seed}"
