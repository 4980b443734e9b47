"""Muon for every matrix of a model: linear layers, convolution filters, and the stacked matrices of experts."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
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
"""The functions that read a parameter as a stack of matrices ``(stack, outputs, inputs)``, by its role.

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
        """Change every parameter that has a gradient; none where `found_inf` is set, as in torch's fused optimizers."""
        failed = getattr(self, "found_inf", None)
        if failed is not None and failed.is_cpu:  # It can be read; of another device nobody waits to hear.
            if failed.item():
                return
            failed = None
        for group in self.param_groups:
            if parameters := [parameter for parameter in group["params"] if parameter.grad is not None]:
                self._update(parameters, group, failed)

    def _update(self, parameters: list[Tensor], group: dict[str, Any], failed: Tensor | None) -> None:
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        momentum, rate, form = group["momentum"], group["lr"], group["form"]
        averages = [self._average(parameter) for parameter in parameters]
        torch._foreach_lerp_(averages, gradients, 1 - momentum)
        matrices = [FORMS[form](each) for each in torch._foreach_lerp(gradients, averages, momentum)]
        decay = rate * group["weight_decay"]
        torch._foreach_mul_(parameters, 1 - (decay if failed is None else decay * (failed == 0)))
        for parameter, update in zip(parameters, all_orthogonal(matrices), strict=True):
            outputs, inputs = update.shape[1:]
            update = update.mT if form == "stacked matrix" else update
            if failed is not None:
                update = update.masked_fill(failed > 0, 0.0)
            parameter.add_(update.reshape(parameter.shape), alpha=-rate * math.sqrt(max(1, outputs / inputs)))

    def _average(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        average: Tensor = state["momentum_buffer"]
        return average


def all_orthogonal(stacks: Sequence[Tensor]) -> list[Tensor]:
    """Make the matrices of several stacks orthogonal, all of one shape at once: few large products are fast."""
    found: list[Tensor] = list(stacks)
    shapes = [(stack.shape[1:], _computed_in(stack.dtype), stack.device) for stack in stacks]
    for shape in dict.fromkeys(shapes):
        places = [place for place, other in enumerate(shapes) if other == shape]
        updates = orthogonal(torch.cat([stacks[place].to(shape[1]) for place in places]))
        for place, update in zip(places, updates.split([len(stacks[place]) for place in places]), strict=True):
            found[place] = update
    return found


def orthogonal(matrices: Float[Tensor, "stack rows columns"]) -> Float[Tensor, "stack rows columns"]:
    """Make each matrix of a stack nearly orthogonal: its singular values go to about 1, its directions stay.

    It computes in bfloat16, as torch's does, but float64 stays float64.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    wide = matrices.mT if tall else matrices
    wide = wide.to(_computed_in(wide.dtype))
    wide = wide / torch.linalg.matrix_norm(wide, keepdim=True).clamp(min=EPSILON)  # no singular value is above 1
    for _ in range(ITERATIONS):
        gram = wide @ wide.mT
        wide = torch.baddbmm(wide, torch.baddbmm(gram, gram, gram, beta=B, alpha=C), wide, beta=A)
    return wide.mT if tall else wide


def _computed_in(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype == torch.float64 else torch.bfloat16
