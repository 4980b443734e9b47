"""What each process of a run spends its steps on: time, waiting for the others, bytes sent."""

import resource
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gatewright.parallel import expert_parameters, spread_layers
from gatewright.parallel.collectives import waiting
from gatewright.train.result import numel
from gatewright.train.strategies.single import Strategy


class Pace:
    """Measures the steps of a run on one process.

    What a process spends on the mean step has four names. ``step_seconds`` is the time from the first micro-batch to
    the changed weights. ``waiting_seconds`` is the part of it spent in exchanges of tokens and in sums with the other
    processes, but not in DDP's or FSDP's own, which run beside backward. ``all_to_all_bytes`` are sent to other
    processes: rows, outputs and their gradients. ``reduced_bytes`` are those of gradients, which are summed with other
    processes' once per step.
    """

    def __init__(self, model: nn.Module, strategy: Strategy) -> None:
        self._model, self._strategy = model, strategy
        self._recent, self._total = Counter[str](), Counter[str]()

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
        spent: dict[str, Any] = {
            "step_seconds": time.perf_counter() - began,
            "waiting_seconds": waiting.seconds - waited,
            "all_to_all_bytes": self._sent() - sent,
        }
        for measured in (self._recent, self._total):
            measured.update({"steps": 1, **spent})

    @property
    def step_seconds(self) -> float:
        """The mean time of a step since the last `metrics`."""
        return self._mean(self._recent)["step_seconds"]

    def metrics(self) -> dict[str, float]:
        """Return what every process spent on the mean step since the last call; nothing where there is one alone."""
        mean, self._recent = self._mean(self._recent), Counter()
        everyone = self._gather(mean) if self._strategy.world_size > 1 else []
        return {
            f"processes/{rank}/{name}": value for rank, spent in enumerate(everyone) for name, value in spent.items()
        }

    def summary(self, device: torch.device) -> list[dict[str, float]]:
        """Return what each process spent on the mean step since it started, and the most memory that it had."""
        return self._gather({**self._mean(self._total), "peak_memory_bytes": peak_memory(device)})

    def _mean(self, spent: Counter[str]) -> dict[str, float]:
        """Return the mean over the steps; zeros where there were none."""
        names, steps = ("step_seconds", "waiting_seconds", "all_to_all_bytes"), max(spent["steps"], 1)
        return {**{name: spent[name] / steps for name in names}, "reduced_bytes": self._reduced()}

    def _gather(self, own: dict[str, float]) -> list[dict[str, float]]:
        everyone = self._strategy.all_gather([*own.values()])
        return [dict(zip(own, values, strict=True)) for values in everyone]

    def _sent(self) -> float:
        return float(sum(dispatcher.bytes_sent for *_, dispatcher in spread_layers(self._model)))

    def _reduced(self) -> float:
        """Count the bytes of all gradients but those of experts that live on this process alone."""
        if self._strategy.world_size == 1:
            return 0.0
        alone = {parameter for _, parameter in expert_parameters(self._model)} if self._strategy.replicas == 1 else ()
        each = (
            numel(parameter) * parameter.element_size()
            for parameter in self._model.parameters()
            if parameter not in alone
        )
        return float(sum(each))


def peak_memory(device: torch.device) -> float:
    """Return the most bytes that this process had: of tensors on a GPU, on the CPU of everything."""
    if device.type == "cuda":
        return float(torch.cuda.max_memory_allocated(device))
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1.0 if sys.platform == "darwin" else 1024.0)
