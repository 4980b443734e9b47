"""Expert choice: each expert takes its best tokens of a batch, and learns a threshold for single ones."""

from dataclasses import replace
from types import MappingProxyType

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from gatewright.routers.base import EvenGate, Router, gate_logits, normalized
from gatewright.routing import Routing, flat_routing
from gatewright.scope import ONE_PROCESS, BatchScope


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
        num_experts: How many experts there are.
        top_k: Experts per token on average: the capacity factor ``c`` of the first paper.
        normalize: Whether a token's weights are divided by their sum, as in the second paper, instead of being scores.
            A token of one expert then has weight 1 and does not teach the gate.
        gate_bias: Whether the gate adds a bias, zero at first, as gpt-oss's does.

    Raises:
        ValueError: If top_k is above num_experts or a size is below 1.
    """

    default_losses = MappingProxyType({"threshold": 0.1})

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

    def forward(self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS) -> Routing:
        """Let every expert choose: the best of the batch in training, what is above its threshold in evaluation."""
        logits = gate_logits(features, self.gate)
        scores = logits.softmax(-1)
        margin = scores.detach() - self.threshold.to(scores.dtype)
        if not self.training:
            everyone = torch.arange(scores.shape[0], device=scores.device)[:, None].expand_as(scores)
            return self._routing(logits, scores, margin > 0, everyone)
        every = scope.gather(scores.detach())
        num_tokens, first = scores.shape[0], scope.token_offset(scores.shape[0])
        count = even_share(every.shape[0], self.num_experts, self.top_k)
        chosen_mask = largest_mask(every, count)[first : first + num_tokens]
        best = scores.detach().masked_fill(~chosen_mask, -1.0).topk(min(count, num_tokens), dim=0).indices
        routing = self._routing(logits, scores, chosen_mask, best)
        return replace(routing, sums=replace(routing.sums, threshold=threshold_miss(margin, chosen_mask)))

    def _routing(
        self,
        logits: Float[Tensor, "tokens experts"],
        scores: Float[Tensor, "tokens experts"],
        chosen_mask: Bool[Tensor, "tokens experts"],
        token_index: Int[Tensor, "rows experts"],
    ) -> Routing:
        """List one token for every expert, then another for every one; mark those that it did not choose."""
        weight = normalized(scores * chosen_mask) if self.normalize else scores
        # Only its loss teaches the threshold. Without a part in the output, be it 0, DDP would take it for unused.
        weight = weight + 0 * self.threshold.to(weight.dtype)
        expert_index = torch.arange(self.num_experts, device=scores.device).expand_as(token_index)
        not_chosen = ~chosen_mask.gather(0, token_index)
        return flat_routing(
            token_index.flatten(),
            expert_index.masked_fill(not_chosen, self.num_experts).flatten(),
            weight.gather(0, token_index).masked_fill(not_chosen, 0.0).flatten(),
            logits,
            scores,
        )


def even_share(num_tokens: int, num_experts: int, top_k: int) -> int:
    """Return how many tokens each expert takes: ``tokens * top_k / experts``, rounded half up, and at least 1."""
    share = (2 * num_tokens * top_k + num_experts) // (2 * num_experts)
    return min(max(share, 1), num_tokens)


def largest_mask(scores: Float[Tensor, "tokens experts"], count: int) -> Bool[Tensor, "tokens experts"]:
    """Mark the ``count`` largest scores of every column; of equal ones the first, on every device."""
    least = scores.topk(count, dim=0).values[-1:]
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
        chosen_mask: Who was chosen in the batch, ``M_batchwise``.
    """
    return (((margin > 0).to(margin.dtype) - chosen_mask.to(margin.dtype)) * margin).sum()
