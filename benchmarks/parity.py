"""What has to hold before a layer's time is reported: its output and its gradients are those of the module loop."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.arms import Routed

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
MARGIN = {torch.float32: 1e-4, torch.bfloat16: 5e-2}
"""Tokens whose k-th and next logits are nearer than this may be routed otherwise by another rounding."""


@dataclass(frozen=True)
class Trace:
    """What a layer made of some tokens, and of a gradient of its output.

    Args:
        output: Of the tokens whose routing is clear.
        gradient: Of these tokens.
        weights: The norm of the gradient of all weights, and its product with the weights over their norm. Both are
            the same however a peer lays out its weights.
    """

    output: Tensor
    gradient: Tensor
    weights: Tensor

    def difference(self, exact: "Trace") -> float:
        """Return the largest of the three differences in norm, over the exact norm."""
        pairs = ((getattr(self, name), getattr(exact, name)) for name in self.__dataclass_fields__)
        return max(float((found - right).norm() / right.norm()) for found, right in pairs)


def clear_tokens(loop: Routed, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which tokens have no two experts near the border between chosen and not."""
    logits = loop.logits(x.to(loop.gate.dtype)).detach().sort(descending=True).values
    if loop.top_k == logits.shape[1]:
        return torch.ones_like(logits[:, 0], dtype=torch.bool)
    return logits[:, loop.top_k - 1] - logits[:, loop.top_k] > MARGIN[dtype]


def trace(arm: nn.Module, x: Tensor, gradient: Tensor, clear: Tensor) -> Trace:
    """Run an arm forward and backward; tokens that are not clear have no gradient."""
    arm.zero_grad()
    x = x.detach().requires_grad_()
    output = arm(x)
    output.backward(gradient * clear[:, None])
    assert x.grad is not None
    products = torch.stack([products_of(each) for each in arm.parameters() if each.grad is not None]).sum(0)
    weights = torch.stack([products[0].sqrt(), products[1] / products[2].sqrt()])
    return Trace(output.detach().double()[clear], x.grad.double()[clear], weights)


def products_of(parameter: Tensor) -> Tensor:
    """Return the squared norm of a gradient, its product with the parameter, and the parameter's squared norm."""
    assert parameter.grad is not None
    value, gradient = parameter.detach().double(), parameter.grad.double()
    return torch.stack([gradient.square().sum(), (value * gradient).sum(), value.square().sum()])
