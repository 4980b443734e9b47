"""Whether losses and gradients are finite, asked of the device now and then, and where a run went wrong first."""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gatewright.tasks import Batch

MAX_STEPS, MAX_BYTES = 20, 2**25
"""The most optimizer steps, and bytes of their batches, that wait to be found finite."""


class TrainingDiverged(RuntimeError):  # noqa: N818 - what happened, as users say it
    """A loss or a gradient was not finite at a step; nothing was saved after the last good checkpoint."""

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step
        """The number of the step, from 0: how many were good before it."""


@dataclass(frozen=True)
class Step:
    """What is kept of an optimizer step until it is known to be finite.

    Args:
        number: The number of the step, from 0.
        batches: Its global micro-batches.
        values: The loss of every micro-batch, and then the norm of the gradient.
    """

    number: int
    batches: Sequence[Batch]
    values: Float[Tensor, " values"]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the batches."""
        return sum(tensor.nbytes for batch in self.batches for tensor in batch)

    @property
    def bad_batch(self) -> Batch | None:
        """Return the first micro-batch whose loss is not finite; none where the gradient alone is not."""
        losses = zip(self.batches, self.values.tolist(), strict=False)
        return next((batch for batch, loss in losses if not math.isfinite(loss)), None)

    def diverged(self, layer: str | None) -> TrainingDiverged:
        """Return the error that says what was not finite, and in which layer first."""
        value = next(value for value in self.values.tolist() if not math.isfinite(value))
        what = "gradient norm" if self.bad_batch is None else "loss"
        return TrainingDiverged(
            f"The {what} became {value} at step {self.number + 1}; the first layer that is not finite is "
            f"{layer or 'the loss itself'}. Try a lower `optim.lr`, `optim.clip_norm=1.0` or `precision=float32`.",
            self.number,
        )


class FiniteCheck:
    """Notes on the device whether every step is finite, so that no step waits for the device to find out."""

    def __init__(self, device: torch.device) -> None:
        self.failed = torch.zeros((), device=device)
        """1 from the first step on that was not finite; as the `found_inf` of an optimizer it has the weights stay."""
        self._steps: list[Step] = []

    def note(self, step: Step) -> None:
        """Keep a step, and whether it was finite."""
        self.failed.masked_fill_(~step.values.isfinite().all(), 1.0)
        self._steps.append(step)

    def is_due(self) -> bool:
        """Whether as many steps are kept as may be."""
        return len(self._steps) >= MAX_STEPS or sum(step.nbytes for step in self._steps) > MAX_BYTES

    def first_failure(self) -> Step | None:
        """Wait for the device, forget all steps, and return the first one that was not finite, if there is any."""
        steps, self._steps = self._steps, []
        failed = (step for step in steps if not step.values.isfinite().all())
        return next(failed) if steps and self.failed else None


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
