"""Top-k routing by softmax or sigmoid scores: Switch, GShard, Mixtral and their kin."""

import warnings
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.routers.base import TASK_GRADIENT_HINT, Router, Score, check_score, normalized, score_logits
from gatewright.routers.gate import EvenGate, gate_logits
from gatewright.routing import Routing, top_k_routing
from gatewright.scope import ONE_PROCESS, BatchScope, Mask


class TopK(Router):
    """Send each token to the k experts of the largest logits.

    Switch (https://arxiv.org/abs/2101.03961 eqs. 1 and 2) is ``top_k=1``; Mixtral is ``top_k=2,
    score_after_top_k=True``; DeepSeek-V3's scores (https://arxiv.org/abs/2412.19437 eqs. 13 to 15) are
    ``score="sigmoid", normalize=True``.

    Args:
        dim: Size of the features a token is routed by.
        num_experts: Number of experts.
        top_k: Experts per token.
        score: Function that turns logits into weights.
        score_after_top_k: Whether the score is taken over the chosen logits alone, instead of over all experts first.
            For sigmoid, which looks at one logit at a time, it makes no difference.
        normalize: Whether the k chosen weights are divided by their sum.
        jitter: Size of the uniform noise that multiplies features in training, in ``[1 - jitter, 1 + jitter]``, as in
            Switch's code; 1e-2 there.
        gate_bias: Whether the gate adds a bias, zero at first, as gpt-oss's does.

    Raises:
        ValueError: If top_k is above num_experts, a size is below 1, jitter is outside ``[0, 1)`` or score is unknown.
    """

    default_losses = MappingProxyType({"load_balance": 0.01})

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        *,
        score: Score = "softmax",
        score_after_top_k: bool = False,
        normalize: bool = False,
        jitter: float = 0.0,
        gate_bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        check_score(score)
        if not 0 <= jitter < 1:
            raise ValueError(f"jitter is at least 0 and below 1; got {jitter}. Switch uses 0.01.")
        if top_k == 1 < num_experts and (normalize or (score == "softmax" and score_after_top_k)):
            warnings.warn(TASK_GRADIENT_HINT.format(router="TopK"), stacklevel=2)
        self.score, self.score_after_top_k, self.normalize, self.jitter = score, score_after_top_k, normalize, jitter
        self.gate: nn.Module = EvenGate(dim, num_experts, bias=gate_bias)

    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token; jitter in training only."""
        if self.training and self.jitter:
            features = features.to(torch.promote_types(features.dtype, torch.float32))
            features = features * (1 + self.jitter * (2 * scope.uniform(features, mask=mask) - 1))
        logits = gate_logits(features, self.gate)
        scores = score_logits(logits, self.score)
        expert_index = scope.chosen(logits.topk(self.top_k).indices)
        if self.score_after_top_k:
            weight = score_logits(logits.gather(-1, expert_index), self.score)
        else:
            weight = scores.gather(-1, expert_index)
        if self.normalize:
            weight = normalized(weight)
        probs = scores if self.score == "softmax" else normalized(scores)
        return top_k_routing(expert_index, weight, logits, probs, mask=mask)
