"""Noisy top-k gating, exactly as Shazeer et al. 2017 define it: https://arxiv.org/abs/1701.06538."""

import warnings
from types import MappingProxyType

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from gatewright.routers.base import MIN_NOISE_STD, TASK_GRADIENT_HINT, Router, largest, load_probability
from gatewright.routers.gate import Gate, gate_logits
from gatewright.routing import Routing, top_k_routing
from gatewright.scope import ONE_PROCESS, BatchScope, Mask


class NoisyTopK(Router):
    """Keep the top k of logits with learned noise, and weigh them by a softmax over the k kept.

    In training, eqs. 3 to 5 of https://arxiv.org/abs/1701.06538::

        H(x)_i = (x W_gate)_i + N(0, 1) * softplus((x W_noise)_i)
        G(x)   = softmax(keep_top_k(H(x), k))

    In evaluation there is no noise. Both matrices start at zero, as in the paper's appendix A: the first batches are
    routed by noise alone, of standard deviation ``softplus(0) = 0.69``, and so evenly. Of equal logits the expert with
    the lower index is chosen.

    Args:
        dim: Size of the features a token is routed by.
        num_experts: Number of experts.
        top_k: Experts per token, any from 1 to num_experts. With 1 the weight is always 1 and the task does not teach
            the gate; a warning says so.
        gate_bias: Whether ``W_gate`` has a bias beside it, zero at first, as gpt-oss's gate does; the paper has none.

    Raises:
        ValueError: If top_k is above num_experts or a size is below 1.
    """

    default_losses = MappingProxyType({"importance": 0.1, "load": 0.1})

    def __init__(self, dim: int, num_experts: int, top_k: int = 2, *, gate_bias: bool = False) -> None:
        super().__init__(dim, num_experts, top_k)
        if top_k == 1 < num_experts:
            warnings.warn(TASK_GRADIENT_HINT.format(router="NoisyTopK"), stacklevel=2)
        self.gate, self.noise = Gate(dim, num_experts, bias=gate_bias), Gate(dim, num_experts, bias=False)

    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token, with noise in training only."""
        logits = gate_logits(features, self.gate)
        noisy_logits, load = logits, None
        if self.training:
            noise_std = F.softplus(gate_logits(features, self.noise)).clamp(min=MIN_NOISE_STD)
            noisy_logits = logits + noise_std * scope.normal(logits, mask=mask)
            load = load_probability(logits, noisy_logits, noise_std, self.top_k)
        expert_index = scope.chosen(largest(noisy_logits, self.top_k))
        weight = noisy_logits.gather(-1, expert_index).softmax(-1)
        return top_k_routing(expert_index, weight, logits, logits.softmax(-1), load, mask)
