"""Sinkhorn routing: in training, the experts that a balanced plan for the whole batch gives each token."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.ops import sinkhorn
from gatewright.routers.base import Router, Score, check_score, largest, normalized, score_logits
from gatewright.routers.gate import EvenGate, gate_logits
from gatewright.routing import Routing, real_only, top_k_routing
from gatewright.scope import ONE_PROCESS, BatchScope, Mask


class Sinkhorn(Router):
    """Choose by a plan that loads experts evenly, and weigh by the gate's own scores: S-BASE.

    https://arxiv.org/abs/2202.01169. In training a token goes to the k experts of the largest entries in its row of
    ``Pi = diag(u) exp(logits) diag(v)``, whose rows sum to 1 and columns to tokens / experts over the global batch
    (`gatewright.ops.sinkhorn`); Pi takes no part in the gradient. Evaluation looks at one token at a time and takes the
    k largest logits. The weight is the score of the raw logits in both, so a first choice need not weigh most.

    The plan is even and the choice of its largest entries nearly so: the more tokens and the surer the gate, the more
    even. A single token, or tokens all alike, have a plan of equal entries and go anywhere.

    The loss defaults to none, because the plan balances already. It does so in training alone: evaluation follows the
    raw logits, and a loss that counts assignments sees the plan's, which are even whatever the logits are.

    Args:
        dim: Size of the features a token is routed by.
        num_experts: Number of experts.
        top_k: Experts per token.
        score: Function that turns logits into weights, over all experts and not normalised over the chosen.
        tolerance: Logarithm of the factor by which a column of Pi may miss its sum.
        max_iterations: Most iterations for it, of one pass over the global batch's logits each.
        gate_bias: Whether the gate adds a bias, zero at first, as gpt-oss's does.

    Raises:
        ValueError: If top_k is above num_experts, a size or max_iterations is below 1, tolerance is not positive or
            score is unknown.
    """

    compares_tokens = True

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 1,
        *,
        score: Score = "softmax",
        tolerance: float = 1e-3,
        max_iterations: int = 100,
        gate_bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        check_score(score)
        if not tolerance > 0 or max_iterations < 1:
            raise ValueError(
                f"tolerance is above 0 and max_iterations at least 1; got {tolerance} and {max_iterations}. "
                "The defaults are 0.001 and 100."
            )
        self.score, self.tolerance, self.max_iterations = score, tolerance, max_iterations
        self.gate = EvenGate(dim, num_experts, bias=gate_bias)

    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token: by the plan in training, by its logits in evaluation."""
        logits = gate_logits(features, self.gate)
        scores = score_logits(logits, self.score)
        plan = logits.detach()
        if self.training:  # Of each row of Pi, its logarithm up to a constant.
            every = scope.gather(real_only(plan, mask, -torch.inf))
            plan = plan + sinkhorn(every, self.tolerance, self.max_iterations)
        expert_index = scope.chosen(largest(plan, self.top_k))
        return top_k_routing(expert_index, scores.gather(-1, expert_index), logits, normalized(scores), mask=mask)
