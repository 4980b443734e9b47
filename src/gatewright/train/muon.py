"""Muon for every matrix of a model: linear layers, convolution filters, and the stacked matrices of experts."""

import math
from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.optim import Optimizer

A, B, C = 3.4445, -4.7750, 2.0315
"""Coefficients of the Newton-Schulz iteration: https://kellerjordan.github.io/posts/muon/."""
ITERATIONS = 5
EPSILON = 1e-7

FORMS: Mapping[str, Callable[[Tensor], Tensor]] = MappingProxyType(
    {
        "matrix": lambda parameter: parameter[None],
        "filter": lambda parameter: parameter.flatten(1)[None],
        "stacked matrix": lambda parameter: parameter.mT,
        "stacked filter": lambda parameter: parameter.flatten(2),
    }
)
"""How a parameter is read as a stack of matrices ``(stack, outputs, inputs)``, by its role.

A stacked matrix is ``(experts, inputs, outputs)``, as a grouped product takes it, and so the transpose of what
`nn.Linear` would hold for the same expert.
"""


class Muon(Optimizer):
    """`torch.optim.Muon` for each matrix of a stack, all of them at once: https://kellerjordan.github.io/posts/muon/.

    The momentum of a matrix is replaced by the nearest orthogonal one before it is subtracted, so that no direction
    dominates an update. Torch's own optimizer takes single matrices only. The experts of a stack are separate matrices
    here: each has the update that it would have alone, or as an `nn.Linear` of its own.

    Args:
        groups: Parameter groups, each with its ``"form"``, a name in `FORMS`.
        lr: Learning rate; a matrix of more outputs than inputs takes it times ``sqrt(outputs / inputs)``.
        momentum: Momentum coefficient, of Nesterov's momentum.
        weight_decay: Share of a weight that is taken off, times the learning rate, at every step.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], *, lr: float, momentum: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, group)

    def _update(self, parameter: Tensor, group: dict[str, Any]) -> None:
        gradient, state, momentum = parameter.grad, self.state[parameter], group["momentum"]
        assert gradient is not None
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        average = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        matrices = FORMS[group["form"]](gradient.lerp(average, momentum))
        outputs, inputs = matrices.shape[1:]
        update = orthogonal(matrices)
        update = update.mT if group["form"] == "stacked matrix" else update
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        parameter.add_(update.reshape(parameter.shape), alpha=-group["lr"] * math.sqrt(max(1, outputs / inputs)))


def orthogonal(matrices: Float[Tensor, "stack rows columns"]) -> Float[Tensor, "stack rows columns"]:
    """Make each matrix of a stack nearly orthogonal: its singular values go to about 1, its directions stay.

    It computes in bfloat16, as torch's does, but float64 stays float64.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide if wide.dtype == torch.float64 else wide.bfloat16()
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=EPSILON)  # no singular value is above 1
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), wide, beta=A)
    return wide.mT if tall else wide
