"""Hash routing: a token's experts are a fixed function of an integer key; and a gate that may begin as such."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Num
from torch import Tensor, nn

from gatewright.routers.base import Router, Score, check_score, score_logits, selected_weight
from gatewright.routers.gate import EvenGate, gate_logits
from gatewright.routing import Routing, top_k_routing
from gatewright.scope import ONE_PROCESS, BatchScope, Mask, noise_key, splitmix64


class Hashed(Router):
    """Send each token to the k experts of the largest hash of (seed, key, expert), each with weight 1 / k.

    Random hashing of https://arxiv.org/abs/2106.04426, where the key is a token's id: the honest control for whether
    learned routing helps. The same key goes to the same experts always, in training and evaluation, in any
    batch and on any machine. Choosing by the largest hash (https://doi.org/10.1109/90.663936) gives every set of k
    experts the same chance; one more expert takes over its share of the keys and moves no other.

    The layer hands keys over as features: ``moe(x, features=keys)``. It needs no losses, and without a gate it has no
    parameters.

    With a gate the experts' weights are learned, as in the first layers of DeepSeek-V4: the gate's scores of the chosen
    experts, divided by their sum. It looks at the numbers behind the key,
    ``moe(x, features=torch.cat([keys, x], dim=-1))``; the key is then below 2**24, above which float32 has gaps.

    Args:
        dim: Number of integers in a token's key; they are hashed together, in order.
        num_experts: Number of experts.
        top_k: Experts per token.
        seed: Seed of the hash; another one gives an unrelated assignment.
        gate_dim: Size of the features behind the key that a gate looks at; 0 is no gate.
        score: Function that turns the gate's logits into weights.

    Raises:
        ValueError: If top_k is above num_experts, a size is below 1, gate_dim is negative or the score is unknown; in
            forward, if features are not integers and there is no gate.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        *,
        seed: int = 0,
        gate_dim: int = 0,
        score: Score = "sqrt_softplus",
    ) -> None:
        if gate_dim < 0:
            raise ValueError(f"gate_dim is at least 0, where there is no gate; got {gate_dim}.")
        check_score(score)
        super().__init__(dim + gate_dim, num_experts, top_k)
        self.seed, self._key = seed, noise_key(seed)
        self.gate_dim, self.score = gate_dim, score
        self.gate = EvenGate(gate_dim, num_experts, bias=False) if gate_dim else None

    def forward(
        self, features: Num[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token by its key; nothing is random."""
        keys, seen = features.split([self.dim - self.gate_dim, self.gate_dim], dim=-1)
        expert_index = scope.chosen(self._hashes(keys).topk(self.top_k).indices)
        logits = self._logits(features, seen)
        if self.gate is None:
            weight = torch.full_like(expert_index, 1 / self.top_k, dtype=torch.float32)
        else:
            weight = selected_weight(score_logits(logits, self.score), expert_index, normalize=True, scale=1)
        probs = torch.zeros_like(logits).scatter(1, expert_index, weight)
        return top_k_routing(expert_index, weight, logits, probs, mask=mask)

    def _logits(self, features: Tensor, seen: Tensor) -> Float[Tensor, "tokens experts"]:
        if self.gate is not None:
            return gate_logits(seen, self.gate)
        if features.is_floating_point():
            raise ValueError(
                f"Hashed routes by integer keys; pass them as moe(x, features=keys). Got features of {features.dtype}."
            )
        return torch.zeros(features.shape[0], self.num_experts, dtype=torch.float32, device=features.device)

    def _hashes(self, keys: Num[Tensor, "tokens dim"]) -> Int[Tensor, "tokens experts"]:
        """Hash one number after the other into what came before; no two experts of a key get the same."""
        hashed = torch.full_like(keys[:, 0], self._key, dtype=torch.int64)
        for column in keys.to(torch.int64).unbind(1):
            hashed = splitmix64(hashed ^ column)
        return splitmix64(hashed[:, None] ^ torch.arange(self.num_experts, device=keys.device))

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        gated = f", gate_dim={self.gate_dim}, score={self.score}" if self.gate_dim else ""
        return f"{super().extra_repr()}, seed={self.seed}{gated}"


class TokenGate(nn.Module):
    """Add to a gate's logits those of a learned table of tokens: ``h(x) = W x + T[token]``.

    It takes the place of a router's gate: ``router = TopK(1 + dim, num_experts, top_k)``, then ``router.gate =
    TokenGate(dim, num_experts, num_tokens)``. Features are the token's number and then those that the gate sees:
    ``moe(x, features=torch.cat([tokens[..., None], x], dim=-1))``. This is a linear gate that sees the token as a
    one-hot vector beside its features.

    The table can begin as hash routing (https://arxiv.org/abs/2106.04426): a token's own experts, those that `Hashed`
    would send it to, then begin ahead of the others, and training moves the choice where another one is better.

    Args:
        dim: Size of the features behind the token's number.
        num_experts: Number of experts.
        num_tokens: Number of different tokens; below 2**24, above which float32 has gaps.
        top_k: Number of experts that begin ahead of the others.
        hash_start: Logit that they begin with; at 0 the table begins at zero and favours none.
        seed: Seed of the hash.
    """

    def __init__(
        self, dim: int, num_experts: int, num_tokens: int, *, top_k: int = 1, hash_start: float = 0.0, seed: int = 0
    ) -> None:
        super().__init__()
        self.top_k, self.hash_start, self.seed = top_k, hash_start, seed
        self.gate = EvenGate(dim, num_experts, bias=False)
        self.table = nn.Parameter(torch.empty(num_tokens, num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Begin with the table of hash routing, or one of zeros."""
        self.gate.reset_parameters()
        nn.init.zeros_(self.table)
        if self.hash_start and self.table.device.type != "meta":
            num_tokens, num_experts = self.table.shape
            keys = torch.arange(num_tokens, device=self.table.device)[:, None]
            chosen = Hashed(1, num_experts, self.top_k, seed=self.seed)(keys)  # all first choices, then all second ones
            with torch.no_grad():
                self.table[chosen.token_index, chosen.expert_index] = self.hash_start

    def forward(self, features: Float[Tensor, "tokens dim"]) -> Float[Tensor, "tokens experts"]:
        """Return the logits."""
        logits: Tensor = self.gate(features[..., 1:])
        return logits + F.embedding(features[..., 0].to(torch.int64), self.table)

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        num_tokens, num_experts = self.table.shape
        return f"num_tokens={num_tokens}, num_experts={num_experts}, hash_start={self.hash_start}"
