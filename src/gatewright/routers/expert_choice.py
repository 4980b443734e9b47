"""Expert choice: each expert takes its best tokens of a batch, and learns a threshold for single ones."""

from types import MappingProxyType
from typing import TypeVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatewright.routers.base import Router, normalized
from gatewright.routers.gate import EvenGate, gate_logits
from gatewright.routing import Routing, flat_routing, real_only
from gatewright.routing_sums import RoutingSums
from gatewright.scope import ONE_PROCESS, BatchScope, Mask

Count = TypeVar("Count", int, Tensor)


def threshold_loss(sums: RoutingSums) -> Float[Tensor, ""]:
    """``L_batchwise`` of https://arxiv.org/abs/1701.06538 appendix F, as a mean over tokens instead of a sum."""
    return sums.extra["threshold"] / sums.num_tokens.clamp(min=1)


class ExpertChoice(Router):
    """Send each expert the tokens that score highest for it, in training the same number to each.

    ``S = softmax(x W_gate)`` over the experts. In training an expert takes its ``m = tokens * top_k / num_experts``
    highest scores of the global batch, rounded, at least 1 (https://arxiv.org/abs/2202.09368); of equal scores, the
    first. A token gets any number of experts, or none.

    Evaluation must not depend on a batch: an expert takes every token whose score is above its learned threshold T, as
    in https://arxiv.org/abs/1701.06538 appendix F. The loss ``threshold`` teaches T in training, and nothing else: the
    scores are constants in it, where the paper's formula has a gradient to both. T then moves to the quantile that the
    expert takes, and the gate learns from the task alone.

    Args:
        dim: Size of the features a token is routed by.
        num_experts: Number of experts.
        top_k: Experts per token on average: the capacity factor ``c`` of the first paper.
        normalize: Whether a token's weights are divided by their sum, as in the second paper, instead of being scores.
            A token of one expert then has weight 1 and does not teach the gate.
        gate_bias: Whether the gate adds a bias, zero at first, as gpt-oss's does.

    Raises:
        ValueError: If top_k is above num_experts or a size is below 1.
    """

    default_losses = MappingProxyType({"threshold": 0.1})
    own_losses = MappingProxyType({"threshold": threshold_loss})
    compares_tokens = True

    def __init__(
        self, dim: int, num_experts: int, top_k: int = 2, *, normalize: bool = False, gate_bias: bool = False
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        self.normalize = normalize
        self.gate = EvenGate(dim, num_experts, bias=gate_bias)
        self.threshold = nn.Parameter(torch.full((num_experts,), 1 / num_experts))

    def reset_parameters(self) -> None:
        """Draw the gate as construction does, and set every threshold to the mean score."""
        super().reset_parameters()
        nn.init.constant_(self.threshold, 1 / self.num_experts)

    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Let every expert choose: the best of the batch in training, what is above its threshold in evaluation."""
        logits = gate_logits(features, self.gate)
        scores = logits.softmax(-1)
        margin = scores.detach() - self.threshold.to(scores.dtype)
        chosen_mask, token_index = margin > 0, torch.arange(scores.shape[0], device=scores.device)[:, None]
        if self.training:
            chosen_mask, token_index = self._best(real_only(scores.detach(), mask, -1.0), scope)
        weight = normalized(scores * chosen_mask) if self.normalize else scores
        # Only its loss teaches the threshold. Without a part in the output, be it 0, DDP would take it for unused.
        weight = weight + 0 * self.threshold.to(weight.dtype)
        token_index = token_index.expand(-1, self.num_experts)
        not_chosen = ~chosen_mask.gather(0, token_index)
        expert_index = torch.arange(self.num_experts, device=scores.device).expand_as(token_index)
        expert_index = expert_index.masked_fill(not_chosen, self.num_experts).flatten()
        weight = weight.gather(0, token_index).masked_fill(not_chosen, 0.0).flatten()
        routing = flat_routing(token_index.flatten(), expert_index, weight, logits, scores, mask=mask)
        return routing.with_sums(extra={"threshold": threshold_miss(real_only(margin, mask), chosen_mask)})

    def _best(
        self, scores: Float[Tensor, "tokens experts"], scope: BatchScope
    ) -> tuple[Bool[Tensor, "tokens experts"], Int[Tensor, "rows experts"]]:
        """Mark each expert's share of the global batch, and list the tokens that are in it; no token scores below 0."""
        every, num_tokens, first = scope.gather(scores), scores.shape[0], scope.token_offset(scores.shape[0])
        count = even_share((every[:, 0] >= 0).sum(), self.num_experts, self.top_k)
        most = even_share(every.shape[0], self.num_experts, self.top_k)
        chosen_mask = largest_mask(every, count, most)[first : first + num_tokens]
        return chosen_mask, scores.masked_fill(~chosen_mask, -1.0).topk(min(most, num_tokens), dim=0).indices


def even_share(num_tokens: Count, num_experts: int, top_k: int) -> Count:
    """Return how many tokens each expert takes: ``tokens * top_k / experts``, rounded half up, and at least 1."""
    share = (2 * num_tokens * top_k + num_experts) // (2 * num_experts)
    return share + (share == 0) * (num_tokens > 0)


def largest_mask(
    scores: Float[Tensor, "tokens experts"], count: Int[Tensor, ""], most: int
) -> Bool[Tensor, "tokens experts"]:
    """Mark the ``count`` (up to ``most``) largest scores of every column; of equal ones the first, on every device."""
    if most == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    least = scores.topk(most, dim=0).values.index_select(0, (count - 1).clamp(min=0).view(1))
    above, level = scores > least, scores == least
    room: Tensor = count - above.sum(0)
    return above | (level & (level.cumsum(0) <= room))


def threshold_miss(
    margin: Float[Tensor, "tokens experts"], chosen_mask: Bool[Tensor, "tokens experts"]
) -> Float[Tensor, ""]:
    """``L_batchwise = sum (M_threshold - M_batchwise) (X - T)``: https://arxiv.org/abs/1701.06538 appendix F.

    It is 0 where thresholds choose as the batch does, and positive elsewhere.

    Args:
        margin: Scores minus thresholds, ``X - T``.
        chosen_mask: The tokens that each expert chose in the batch, ``M_batchwise``.
    """
    return (((margin > 0).to(margin.dtype) - chosen_mask.to(margin.dtype)) * margin).sum()
