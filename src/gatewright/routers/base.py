"""What every router is: a module that maps tokens to a `Routing`, and how routers turn logits into choices."""

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewright.ops import stable_sort
from gatewright.reset import refuse_unknown_start, reset_parts
from gatewright.routers.expert_bias import ExpertBias
from gatewright.routing import Routing
from gatewright.routing_sums import Loss, RoutingSums
from gatewright.scope import ONE_PROCESS, BatchScope, Mask

Score = Literal["softmax", "sigmoid", "sqrt_softplus"]

MIN_NOISE_STD = 1e-6
"""Floor under the noise's standard deviation. The paper has none; below it the gradient of the load would be NaN."""

TASK_GRADIENT_HINT = (
    "{router} with top_k=1 normalises the one chosen weight to 1, so the gate gets no gradient from the task and "
    "learns from the balance losses alone. Use top_k=2, or TopK(dim, num_experts, top_k=1) with its default scores "
    "(softmax over all experts, not normalised)."
)


class Router(nn.Module, ABC):
    """Map tokens to a `Routing`.

    Args:
        dim: Size of the features a token is routed by; several trailing dimensions count as their product.
        num_experts: Number of experts to choose among.
        top_k: Number of experts that each token is sent to.

    Raises:
        ValueError: If a size is below 1 or top_k is above num_experts.
    """

    default_losses: Mapping[str, float] = MappingProxyType({})
    """Auxiliary losses and their coefficients where a layer names none."""
    own_losses: Mapping[str, Loss] = MappingProxyType({})
    """Losses that read what this router alone has sums of, by name; they come before those of `LOSSES`."""
    compares_tokens: bool = False
    """Whether the route of a token depends on the other tokens of its batch in training."""

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
    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token. Computes in at least float32, also under autocast.

        What depends on more than the token itself (noise, other tokens) comes from the scope.

        Args:
            features: Features that tokens are routed by.
            scope: The batch that the tokens are part of.
            mask: True where a token is real. The others are sent nowhere, have no part in the sums, and change neither
                where the real ones are sent nor their noise.
        """

    def reset_parameters(self) -> None:
        """Initialise all parameters and buffers as construction does; see `gatewright.MoE.reset_parameters`.

        Raises:
            ValueError: If a tensor belongs to a module without this method. A router that holds tensors itself, and not
                in modules such as a gate, initialises them in a method of its own.
        """
        if type(self).reset_parameters is Router.reset_parameters:
            refuse_unknown_start("the router", self)
        reset_parts(self)

    def check_replayed(self, expert_index: Int[Tensor, "tokens top_k"]) -> None:
        """Refuse experts that this router could not have chosen; by default, any different ones will do.

        Args:
            expert_index: Different experts for each token, which `gatewright.replay_routing` is about to replay.

        Raises:
            ValueError: If a token goes to experts that do not go together.
        """

    def record(self, sums: RoutingSums) -> None:
        """Let parts that adapt note what a training forward routed; one that checkpointing repeats is noted once."""
        for part in self.children():
            if isinstance(part, Router | ExpertBias):
                part.record(sums)

    def end_step(self, scope: BatchScope = ONE_PROCESS) -> None:
        """Let them adapt to what was noted since the last optimizer step; called through `gatewright.end_step`."""
        for part in self.children():
            if isinstance(part, Router | ExpertBias):
                part.end_step(scope)

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return f"dim={self.dim}, num_experts={self.num_experts}, top_k={self.top_k}"


def load_probability(
    logits: Float[Tensor, "*tokens experts"],
    noisy_logits: Float[Tensor, "*tokens experts"],
    noise_std: Float[Tensor, "*tokens experts"],
    top_k: int,
) -> Float[Tensor, "*tokens experts"]:
    """Probability that each expert stays among the top k when its own noise is drawn again.

    Eqs. 8 and 9 of https://arxiv.org/abs/1701.06538: ``P(x, i) = Phi((logit_i - kth_excluding(H, k, i)) / std_i)``.
    The k-th largest noisy logit of the others is the (k+1)-th of all where i is among the top k, and the k-th
    otherwise. With top_k = experts every probability is 1.
    """
    if top_k == logits.shape[-1]:
        return torch.ones_like(logits)
    top = noisy_logits.topk(top_k + 1).values
    kth, next_after = top[..., top_k - 1 : top_k], top[..., top_k : top_k + 1]
    threshold = torch.where(noisy_logits > next_after, next_after, kth)
    probability: Tensor = torch.special.ndtr((logits - threshold) / noise_std)
    return probability


def score_logits(logits: Float[Tensor, "tokens choices"], score: Score) -> Float[Tensor, "tokens choices"]:
    """Turn logits into positive scores: below 1, but for DeepSeek-V4's ``sqrt(log(1 + exp(logit)))``."""
    if score == "sqrt_softplus":
        return F.softplus(logits).clamp(min=torch.finfo(logits.dtype).tiny).sqrt()
    return logits.softmax(-1) if score == "softmax" else logits.sigmoid()


def normalized(scores: Float[Tensor, "tokens choices"]) -> Float[Tensor, "tokens choices"]:
    """Divide each row by its sum."""
    return scores / scores.sum(-1, keepdim=True).clamp(min=torch.finfo(scores.dtype).tiny)


def largest(values: Float[Tensor, "*tokens choices"], count: int) -> Int[Tensor, "*tokens count"]:
    """Find the largest values of each row, in falling order; of equal ones the first come first, on every device."""
    _, order = stable_sort(values, descending=True)
    return order[..., :count]


def selected_weight(
    scores: Float[Tensor, "tokens experts"], expert_index: Int[Tensor, "tokens top_k"], *, normalize: bool, scale: float
) -> Float[Tensor, "tokens top_k"]:
    """Take the scores of chosen experts, divided by their sum where they are to add up to the scale."""
    weight = scores.gather(-1, expert_index)
    return scale * (normalized(weight) if normalize else weight)


def size_of_groups(num_experts: int, num_groups: int, top_k_groups: int) -> int:
    """Return how many experts are in each group.

    Raises:
        ValueError: If the groups are not of equal size, or fewer than are chosen.
    """
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(
            f"num_groups must divide num_experts into groups of equal size; got {num_groups} groups of {num_experts} "
            "experts. Change one of them."
        )
    if not 1 <= top_k_groups <= num_groups:
        raise ValueError(f"top_k_groups is from 1 to num_groups ({num_groups}); got {top_k_groups}.")
    return num_experts // num_groups


def check_score(score: str) -> None:
    """Raise a `ValueError` of a score that there is not."""
    if score not in get_args(Score):
        raise ValueError(f"score is 'softmax', 'sigmoid' or 'sqrt_softplus'; got {score!r}.")


def check_scale(scale: float) -> None:
    """Raise a `ValueError` of a factor on the weights that is not above 0, or not finite."""
    if not 0 < scale < math.inf:
        raise ValueError(f"scale is finite and above 0; got {scale}. DeepSeek-V3 uses 2.5, and 1 leaves weights alone.")
