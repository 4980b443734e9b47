"""Where a run that diverged went wrong first."""

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def first_non_finite(model: nn.Module, inputs: Tensor | None) -> str | None:
    """Name the first parameter, or else the first layer's output on these inputs, that is not finite."""
    for name, parameter in model.named_parameters():
        gradient = parameter.grad if inputs is None else None
        if not torch.isfinite(_here(parameter if gradient is None else gradient)).all():
            return name
    if inputs is None:
        return None
    found: list[str] = []
    suspect = copy.deepcopy(model)  # Its BatchNorm statistics may change, the model's may not.
    for name, module in suspect.named_modules():
        module.register_forward_hook(_reporter(name or "the model", found))
    with torch.no_grad():
        suspect(inputs)
    return found[0] if found else None


def _here(tensor: Tensor) -> Tensor:
    """Return what this process has of a tensor: nothing is asked of the others, who may have found theirs already."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _reporter(name: str, found: list[str]) -> Any:
    def report(module: nn.Module, args: Any, output: Any) -> None:
        if isinstance(output, Tensor) and not torch.isfinite(output).all():
            found.append(name)

    return report
