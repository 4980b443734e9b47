"""What every router is: a module that maps tokens to a `Routing`."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.routing import Routing, RoutingSums
from gatewright.scope import ONE_PROCESS, BatchScope

Score = Literal["softmax", "sigmoid"]

TASK_GRADIENT_HINT = (
    "{router} with top_k=1 normalises the one chosen weight to 1, so the gate gets no gradient from the task and "
    "learns from the balance losses alone. Use top_k=2, or TopK(dim, num_experts, top_k=1) with its default scores "
    "(softmax over all experts, not normalised)."
)


class Router(nn.Module, ABC):
    """Map tokens to a `Routing`.

    Args:
        dim: Size of the features a token is routed by; several trailing dimensions count as their product.
        num_experts: How many experts there are to choose among.
        top_k: How many of them each token is sent to.

    Raises:
        ValueError: If a size is below 1 or top_k is above num_experts.
    """

    default_losses: ClassVar[Mapping[str, float]] = MappingProxyType({})
    """Auxiliary losses and their coefficients where a layer names none; the names are keys of `LOSSES`."""

    def __init__(self, dim: int, num_experts: int, top_k: int) -> None:
        super().__init__()
        if min(dim, num_experts, top_k) < 1:
            raise ValueError(f"dim, num_experts and top_k are at least 1; got {dim}, {num_experts} and {top_k}.")
        if top_k > num_experts:
            raise ValueError(
                f"top_k ({top_k}) cannot exceed num_experts ({num_experts}): a token goes to an expert once. "
                f"Use top_k of at most {num_experts}, or more experts."
            )
        self.dim, self.num_experts, self.top_k = dim, num_experts, top_k

    @abstractmethod
    def forward(self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS) -> Routing:
        """Route every token. Computes in at least float32, also under autocast.

        What depends on more than the token itself (noise, other tokens) comes from the scope.
        """

    def record(self, sums: RoutingSums) -> None:
        """Take note of what a training forward routed; not called again where activation checkpointing repeats it."""

    def end_step(self, scope: BatchScope = ONE_PROCESS) -> None:
        """Adapt to what was noted since the last optimizer step; called through `gatewright.end_step`."""

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}"


def gate_logits(features: Float[Tensor, "tokens dim"], gate: nn.Linear) -> Float[Tensor, "tokens experts"]:
    """Apply a gate in at least float32, whatever autocast or the parameters say; float64 stays float64."""
    dtype = torch.promote_types(torch.promote_types(features.dtype, gate.weight.dtype), torch.float32)
    with torch.autocast(features.device.type, enabled=False):
        return F.linear(features.to(dtype), gate.weight.to(dtype))


def score_logits(logits: Float[Tensor, "tokens choices"], score: Score) -> Float[Tensor, "tokens choices"]:
    """Turn logits into scores in (0, 1)."""
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def normalized(scores: Float[Tensor, "tokens choices"]) -> Float[Tensor, "tokens choices"]:
    """Divide each row by its sum."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def check_score(score: str) -> None:
    """Refuse a score that does not exist.

    Raises:
        ValueError: If it is neither softmax nor sigmoid.
    """
    if score not in ("softmax", "sigmoid"):
        raise ValueError(f"score is 'softmax' or 'sigmoid'; got {score!r}.")
