"""What each process of a run spends its steps on: time, waiting for the others, bytes sent."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn

from gatewright.layers.base import moe_layers
from gatewright.layers.moe import MoE
from gatewright.parallel import ExpertParallel
from gatewright.parallel.collectives import waiting
from gatewright.train.strategies.base import Processes


@dataclass(frozen=True)
class Spent:
    """What one process spent, on one optimizer step or on the mean of several.

    Args:
        step_seconds: From the first micro-batch to the changed weights.
        waiting_seconds: Of these, in exchanges of tokens and in sums with the others; not in DDP's or FSDP's own, which
            run beside backward.
        all_to_all_bytes: Sent to other processes: rows, outputs and their gradients.
        reduced_bytes: Of gradients that are summed with other processes' once per step.
    """

    step_seconds: float
    waiting_seconds: float
    all_to_all_bytes: float
    reduced_bytes: float


class Pace:
    """Measures the steps of a run on one process.

    Args:
        model: The model, on its processes.
        processes: Those of the run.
    """

    def __init__(self, model: nn.Module, processes: Processes) -> None:
        self._model, self._processes = model, processes
        self._last = self._total = [0.0, 0.0, 0.0]
        self._steps = 0

    def going_on_with(self, model: nn.Module) -> "Pace":
        """Return what measures the further steps of a run with another model."""
        following = Pace(model, self._processes)
        following._last, following._total, following._steps = self._last, self._total, self._steps
        return following

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure one step."""
        began, waited, sent = time.perf_counter(), waiting.seconds, self._sent()
        yield
        self._last = [time.perf_counter() - began, waiting.seconds - waited, self._sent() - sent]
        self._total = [total + last for total, last in zip(self._total, self._last, strict=True)]
        self._steps += 1

    def metrics(self) -> dict[str, float]:
        """Return, for every process, what it spent on the last step; nothing where there is one alone."""
        if self._processes.world == 1:
            return {}
        everyone = self._processes.collect([*self._last, self._reduced()])
        return {
            f"processes/{rank}/{name}": value
            for rank, values in enumerate(everyone)
            for name, value in asdict(Spent(*values)).items()
        }

    def summary(self, device: torch.device) -> list[dict[str, float]]:
        """Return what each process spent on the mean step since it started, and the most memory that it had."""
        mean = [value / max(self._steps, 1) for value in self._total]
        everyone = self._processes.collect([*mean, self._reduced(), peak_memory(device)])
        return [{**asdict(Spent(*values[:-1])), "peak_memory_bytes": values[-1]} for values in everyone]

    def _sent(self) -> float:
        layers = (layer for _, layer in moe_layers(self._model) if isinstance(layer, MoE))
        return float(sum(d.bytes_sent for layer in layers if isinstance(d := layer.dispatcher, ExpertParallel)))

    def _reduced(self) -> float:
        return float(sum(_nbytes(parameter) for parameter in self._processes.reduced(self._model)))


def _nbytes(parameter: nn.Parameter) -> int:
    """Count a parameter's bytes, also where ZeRO 3 keeps them elsewhere."""
    numel: int = getattr(parameter, "ds_numel", parameter.numel())
    return numel * parameter.element_size()


def peak_memory(device: torch.device) -> float:
    """Return the most bytes that this process had: of tensors on a GPU, on the CPU of everything."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
