"""Group-limited top-k: choose groups of experts first, then experts within them, as DeepSeek-V2 and V3 do."""

import warnings
from types import MappingProxyType
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.routers.base import (
    TASK_GRADIENT_HINT,
    Router,
    Score,
    check_scale,
    check_score,
    largest,
    normalized,
    score_logits,
    selected_weight,
    size_of_groups,
)
from gatewright.routers.expert_bias import ExpertBias
from gatewright.routers.gate import EvenGate, gate_logits
from gatewright.routing import Routing, top_k_routing
from gatewright.scope import ONE_PROCESS, BatchScope, Mask

GroupScore = Literal["max", "two-largest"]


class GroupLimited(Router):
    """Send each token to the k best experts of its few best groups, which bounds how many devices it travels to.

    The defaults are DeepSeek-V3's (https://arxiv.org/abs/2412.19437 eqs. 12 to 16 and section 2.1.2): sigmoid scores, a
    bias per expert for selection only (`ExpertBias`), a group's score the sum of its two largest biased scores, weights
    of unbiased scores normalised over the chosen. DeepSeek-V2 (https://arxiv.org/abs/2405.04434 section 2.2.2) is
    ``score="softmax", group_score="max", normalize=False, bias_rate=0``; without a bias, give the layer a balance loss
    that can do without one, such as ``losses={"load_balance": 0.01}``.

    Call `gatewright.end_step(model)` after every ``optimizer.step()`` unless bias_rate is 0. Of equal scores the group,
    and within the groups the expert, with the lower index is chosen. A group of one expert has that expert's score. The
    default loss is V3's, whose mean is over a sequence where ours is over the batch.

    Args:
        dim: Size of the features a token is routed by.
        num_experts: Number of experts, in groups of equal size that follow each other.
        top_k: Experts per token.
        num_groups: Number of groups; 8 in DeepSeek-V3.
        top_k_groups: Number of groups that a token may choose from; 4 in DeepSeek-V3.
        score: Function that turns logits into scores.
        group_score: A group's score: its largest, or the sum of its two largest; ``top_k / top_k_groups`` is 2 in V3.
        normalize: Whether the k chosen weights are divided by their sum. With top_k=1 the task then does not teach the
            gate; a warning says so.
        scale: Factor on the weights; 2.5 in DeepSeek-V3.
        bias_rate: Step of the expert bias; 0 leaves it as it is.
        gate_bias: Whether the gate adds a bias, zero at first, as gpt-oss's does.

    Raises:
        ValueError: If sizes do not fit together, a score is unknown, or scale or bias_rate is out of range.
    """

    default_losses = MappingProxyType({"load_balance": 0.0001})

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        num_groups: int = 1,
        top_k_groups: int = 1,
        score: Score = "sigmoid",
        group_score: GroupScore = "two-largest",
        normalize: bool = True,
        scale: float = 1.0,
        bias_rate: float = 0.001,
        gate_bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        check_score(score)
        check_scale(scale)
        _check_groups(num_experts, top_k, num_groups, top_k_groups, group_score)
        if normalize and top_k == 1 < num_experts:
            warnings.warn(TASK_GRADIENT_HINT.format(router="GroupLimited"), stacklevel=2)
        self.num_groups, self.top_k_groups, self.group_score = num_groups, top_k_groups, group_score
        self.score, self.normalize, self.scale = score, normalize, scale
        self.gate = EvenGate(dim, num_experts, bias=gate_bias)
        self.expert_bias = ExpertBias(num_experts, bias_rate)

    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token; nothing is random."""
        logits = gate_logits(features, self.gate)
        scores = score_logits(logits, self.score)
        allowed = within_best_groups(self.expert_bias(scores), self.num_groups, self.top_k_groups, self.group_score)
        expert_index = scope.chosen(largest(allowed, self.top_k))
        weight = selected_weight(scores, expert_index, normalize=self.normalize, scale=self.scale)
        return top_k_routing(expert_index, weight, logits, normalized(scores), mask=mask)

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return f"{super().extra_repr()}, num_groups={self.num_groups}, top_k_groups={self.top_k_groups}"


def within_best_groups(
    scores: Float[Tensor, "tokens experts"], num_groups: int, top_k_groups: int, group_score: GroupScore
) -> Float[Tensor, "tokens experts"]:
    """Keep the scores of each token's best groups; all others become minus infinity, also where scores are negative."""
    grouped = scores.unflatten(-1, (num_groups, scores.shape[-1] // num_groups))
    counted = 1 if group_score == "max" else min(2, grouped.shape[-1])
    best = largest(grouped.topk(counted).values.sum(-1), top_k_groups)
    kept = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
    allowed: Tensor = grouped.masked_fill(~kept[..., None], -torch.inf).flatten(-2)
    return allowed


def _check_groups(num_experts: int, top_k: int, num_groups: int, top_k_groups: int, group_score: str) -> None:
    if group_score not in ("max", "two-largest"):
        raise ValueError(f"group_score is 'max' or 'two-largest'; got {group_score!r}.")
    size = size_of_groups(num_experts, num_groups, top_k_groups)
    if top_k > top_k_groups * size:
        raise ValueError(
            f"top_k ({top_k}) experts must find room in top_k_groups ({top_k_groups}) groups of {size} experts. Use "
            f"top_k of at most {top_k_groups * size}, or more top_k_groups."
        )
