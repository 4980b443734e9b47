"""Interleaved timings with CUDA events, and the memory that a step holds and needs."""

import statistics
from typing import Any

import torch
from torch import Tensor, nn

WARM_UP, ROUNDS = 3, 12


def measure(arms: dict[str, nn.Module], x: Tensor) -> dict[str, dict[str, Any]]:
    """Return median milliseconds and spread of forward, and of forward and backward, and memory, by arm."""
    gradient = torch.randn_like(x)
    for arm in arms.values():
        for _ in range(WARM_UP):
            step(arm, x, gradient)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for _ in range(ROUNDS):
        for name, arm in arms.items():
            times[name].append(step(arm, x, gradient))
    return {name: {**summary(times[name]), **memory(arm, x, gradient)} for name, arm in arms.items()}


def step(arm: nn.Module, x: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Milliseconds on the device of forward, and of forward and backward."""
    arm.zero_grad()
    x.grad = None
    start, between, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    torch.cuda.synchronize()
    start.record()
    output = arm(x)
    between.record()
    output.backward(gradient)
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(between), start.elapsed_time(end)


def summary(times: list[tuple[float, float]]) -> dict[str, float]:
    """Medians, and the spread of the middle half over the median."""
    forward, both = zip(*times, strict=True)
    low, _, high = statistics.quantiles(both, n=4)
    median = statistics.median(both)
    return {"forward_ms": statistics.median(forward), "ms": median, "spread": (high - low) / median}


def memory(arm: nn.Module, x: Tensor, gradient: Tensor) -> dict[str, float]:
    """Megabytes that backward is waited with, and at the peak of a step, above what was there before."""
    arm.zero_grad()
    x.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    output = arm(x)
    held = torch.cuda.memory_allocated() - before - output.nbytes
    output.backward(gradient)
    torch.cuda.synchronize()
    return {"held_mb": held / 1e6, "peak_mb": (torch.cuda.max_memory_allocated() - before) / 1e6}


def profile(arm: nn.Module, x: Tensor, rows: int = 14) -> dict[str, float]:
    """Return the milliseconds of a step's longest kernels, by name."""
    gradient = torch.randn_like(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step(arm, x, gradient)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:60]: round(event.self_device_time_total / 1e3, 3) for event in events[:rows]}
