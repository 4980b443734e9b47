"""What each process of a run spends its steps on: time, waiting for the others, bytes sent."""

import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import torch
from torch import nn

from gatewright.layers import ExpertLayer
from gatewright.layers.base import moe_layers
from gatewright.parallel import ExpertParallel, expert_parameters
from gatewright.parallel.collectives import waiting
from gatewright.train.strategies.single import Strategy


@dataclass(frozen=True)
class Spent:
    """What one process spent on the mean of several optimizer steps.

    Args:
        step_seconds: Time from the first micro-batch to the changed weights.
        waiting_seconds: Part of it that is spent in exchanges of tokens and in sums with the others; not in DDP's or
            FSDP's own, which run beside backward.
        all_to_all_bytes: Sent to other processes: rows, outputs and their gradients.
        reduced_bytes: Bytes of gradients that are summed with other processes' once per step.
    """

    step_seconds: float
    waiting_seconds: float
    all_to_all_bytes: float
    reduced_bytes: float


class Sum:
    """What several steps spent, each on the same things."""

    def __init__(self) -> None:
        self._values, self._count = [0.0, 0.0, 0.0], 0

    def add(self, *values: float) -> None:
        """Add what one more step spent."""
        self._values = [total + value for total, value in zip(self._values, values, strict=True)]
        self._count += 1

    def mean(self) -> list[float]:
        """Return the mean over the steps; zeros where there were none."""
        return [total / max(self._count, 1) for total in self._values]


class Pace:
    """Measures the steps of a run on one process.

    Args:
        model: The model, on its processes.
        strategy: How the run is spread over its processes.
    """

    def __init__(self, model: nn.Module, strategy: Strategy) -> None:
        self._model, self._strategy = model, strategy
        self._recent, self._total = Sum(), Sum()

    def going_on_with(self, model: nn.Module) -> "Pace":
        """Return what measures the further steps of a run with another model."""
        following = Pace(model, self._strategy)
        following._recent, following._total = self._recent, self._total
        return following

    @contextmanager
    def step(self) -> Iterator[None]:
        """Measure one step, or what of it does not go on beside the next ones."""
        began, waited, sent = time.perf_counter(), waiting.seconds, self._sent()
        yield
        for measured in (self._recent, self._total):
            measured.add(time.perf_counter() - began, waiting.seconds - waited, self._sent() - sent)

    @property
    def step_seconds(self) -> float:
        """The mean time of a step since the last `metrics`."""
        return self._recent.mean()[0]

    def metrics(self) -> dict[str, float]:
        """Return what every process spent on the mean step since the last call; nothing where there is one alone."""
        mean, self._recent = self._recent.mean(), Sum()
        everyone = self._strategy.all_gather([*mean, self._reduced()]) if self._strategy.world_size > 1 else []
        return {
            f"processes/{rank}/{name}": value
            for rank, values in enumerate(everyone)
            for name, value in asdict(Spent(*values)).items()
        }

    def summary(self, device: torch.device) -> list[dict[str, float]]:
        """Return what each process spent on the mean step since it started, and the most memory that it had."""
        everyone = self._strategy.all_gather([*self._total.mean(), self._reduced(), peak_memory(device)])
        return [{**asdict(Spent(*values[:-1])), "peak_memory_bytes": values[-1]} for values in everyone]

    def _sent(self) -> float:
        layers = (layer for _, layer in moe_layers(self._model) if isinstance(layer, ExpertLayer))
        return float(sum(d.bytes_sent for layer in layers if isinstance(d := layer.dispatcher, ExpertParallel)))

    def _reduced(self) -> float:
        """Count the bytes of all gradients but those of experts that live on this process alone."""
        if self._strategy.world_size == 1:
            return 0.0
        alone = {parameter for _, parameter in expert_parameters(self._model)} if self._strategy.replicas == 1 else ()
        return float(sum(_nbytes(parameter) for parameter in self._model.parameters() if parameter not in alone))


def _nbytes(parameter: nn.Parameter) -> int:
    """Count a parameter's bytes, also where ZeRO 3 keeps them elsewhere."""
    numel: int = getattr(parameter, "ds_numel", parameter.numel())
    return numel * parameter.element_size()


def peak_memory(device: torch.device) -> float:
    """Return the most bytes that this process had: of tensors on a GPU, on the CPU of everything."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
