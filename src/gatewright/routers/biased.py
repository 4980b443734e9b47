"""Loss-free balancing: a bias per expert decides who is chosen, never how much it counts."""

import warnings

from jaxtyping import Float
from torch import Tensor, nn

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
)
from gatewright.routers.expert_bias import ExpertBias
from gatewright.routers.gate import EvenGate, gate_logits
from gatewright.routing import Routing, top_k_routing
from gatewright.scope import ONE_PROCESS, BatchScope, Mask


class Biased(Router):
    """Send each token to the k experts of the largest biased scores, and weigh them by the scores themselves.

    Eqs. 13 to 16 of https://arxiv.org/abs/2412.19437, from https://arxiv.org/abs/2408.15664::

        s_i = sigmoid(x W_gate)_i
        g_i = s_i if s_i + b_i is among the k largest, else 0
        G_i = scale * g_i / sum_j g_j

    Call `gatewright.end_step(model)` after every ``optimizer.step()``: it moves the bias, see `ExpertBias`. Of equal
    biased scores the expert with the lower index is chosen. Assignments stand in the order of the biased scores, so a
    token's first choice need not weigh most.

    Args:
        dim: Size of the features a token is routed by.
        num_experts: Number of experts.
        top_k: Experts per token.
        score: Function that turns logits into scores.
        normalize: Whether the k chosen weights are divided by their sum. With top_k=1 the task then does not teach the
            gate; a warning says so.
        scale: Factor on the weights; 2.5 in DeepSeek-V3.
        bias_rate: Step of the expert bias; 0 leaves it as it is.
        gate_bias: Whether the gate adds a bias, zero at first, as gpt-oss's does.

    Raises:
        ValueError: If top_k is above num_experts, a size is below 1, score is unknown, or scale or bias_rate is out of
            range.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        score: Score = "sigmoid",
        normalize: bool = True,
        scale: float = 1.0,
        bias_rate: float = 0.001,
        gate_bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        check_score(score)
        check_scale(scale)
        if normalize and top_k == 1 < num_experts:
            warnings.warn(TASK_GRADIENT_HINT.format(router="Biased"), stacklevel=2)
        self.score, self.normalize, self.scale = score, normalize, scale
        self.gate: nn.Module = EvenGate(dim, num_experts, bias=gate_bias)
        self.expert_bias = ExpertBias(num_experts, bias_rate)

    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token; nothing is random."""
        logits = gate_logits(features, self.gate)
        scores = score_logits(logits, self.score)
        expert_index = scope.chosen(largest(self.expert_bias(scores), self.top_k))
        weight = selected_weight(scores, expert_index, normalize=self.normalize, scale=self.scale)
        return top_k_routing(expert_index, weight, logits, normalized(scores), mask=mask)
