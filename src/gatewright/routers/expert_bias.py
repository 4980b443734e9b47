"""The expert bias: what evens out the load without a loss."""

import math
import warnings
from collections.abc import Callable
from typing import Self

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.routing_sums import RoutingSums
from gatewright.scope import BatchScope

FORGOTTEN_STEPS = 1000
"""Training forwards without a step of the expert bias after which a warning says so."""

FORGOTTEN_STEP_HINT = (
    f"{FORGOTTEN_STEPS} training forwards were routed by an expert bias that never moved, so nothing evens out the "
    "load. Call gatewright.end_step(model) after every optimizer.step(), or pass bias_rate=0 to keep the bias as it is."
)


class ExpertBias(nn.Module):
    """A bias per expert that evens out the load without a loss: https://arxiv.org/abs/2408.15664 algorithm 1.

    It is added to scores for selection only, and has no gradient: once per optimizer step, from the assignments of all
    training forwards since the last one, ``b_i += rate * sign(mean(load) - load_i)``. It stays float32 in a model of
    any other type, because a step of 0.001 vanishes next to a bfloat16 of 0.5.

    Args:
        num_experts: Number of experts.
        rate: Size of a step: 0.001 in the paper, where 0.0001 is slow and 0.01 swings. 0 leaves the bias as it is.

    Raises:
        ValueError: If the rate is negative or not finite.
    """

    bias: Tensor
    load: Tensor

    def __init__(self, num_experts: int, rate: float = 0.001) -> None:
        super().__init__()
        if not 0 <= rate < math.inf:
            raise ValueError(f"bias_rate is finite and at least 0; got {rate}. DeepSeek uses 0.001.")
        self.rate = rate
        self.register_buffer("bias", torch.empty(num_experts, dtype=torch.float32))
        self.register_buffer("load", torch.empty(num_experts, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start with biases of zero, and nothing noted."""
        self.bias.zero_()
        self.load.zero_()
        self._forwards_left = FORGOTTEN_STEPS

    def forward(self, scores: Float[Tensor, "tokens experts"]) -> Float[Tensor, "tokens experts"]:
        """Return what to select by: scores and bias, without a gradient."""
        return scores.detach() + self.bias

    def record(self, sums: RoutingSums) -> None:
        """Add the assignments of a training forward to the load."""
        if not self.training or self.rate == 0:
            return
        self.load.add_(sums.tokens_per_expert.detach())
        if not torch.compiler.is_compiling() and self._forwards_left:  # A graph would be compiled anew for every count.
            self._forwards_left -= 1
            if self._forwards_left == 0:
                warnings.warn(FORGOTTEN_STEP_HINT, stacklevel=2)

    def end_step(self, scope: BatchScope) -> None:
        """Move every bias by one step, from the load of the global batch, and begin to count anew."""
        (load,) = scope.sum(self.load)
        self.bias.add_((load.sum() - len(load) * load).sign().to(self.bias.dtype), alpha=self.rate)
        self.load.zero_()
        self._forwards_left = 0

    def extra_repr(self) -> str:
        """Show the step when a model is printed."""
        return f"rate={self.rate}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move to another device, but not to another type; off the meta device, to zeros."""
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in before.items():
            device = getattr(self, name).device
            kept = torch.zeros_like(buffer, device=device) if buffer.is_meta else buffer.to(device)
            setattr(self, name, kept)
        return self
