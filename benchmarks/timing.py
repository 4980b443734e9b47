"""Interleaved timings, and the memory that a step holds and needs, on a CPU or a CUDA device."""

import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

MOST_ROUNDS, FEWEST_ROUNDS, QUICK = 25, 3, 0.5


class Watch:
    """Marks moments on a device: where there are events, on the device itself."""

    def __init__(self, device: torch.device) -> None:
        self.cuda = device.type == "cuda"

    def wait(self) -> None:
        """Wait until the device is idle."""
        if self.cuda:
            torch.cuda.synchronize()

    def mark(self) -> Any:
        """Mark this moment."""
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Return the time between two marks, after a wait."""
        return float(start.elapsed_time(end)) if self.cuda else (end - start) * 1e3


def step(arm: nn.Module, x: Tensor, gradient: Tensor) -> tuple[float, float]:
    """Return the milliseconds of forward, and of forward and backward."""
    arm.zero_grad()
    x.grad = None
    watch = Watch(x.device)
    watch.wait()
    start = watch.mark()
    output = arm(x)
    between = watch.mark()
    output.backward(gradient)
    end = watch.mark()
    watch.wait()
    return watch.milliseconds(start, between), watch.milliseconds(start, end)


def warm(arm: Callable[[], Any]) -> float:
    """Call an arm until it is warm, once if it is slow, and return the seconds that the last call took."""
    took = math.inf
    for _ in range(3):
        start = time.perf_counter()
        arm()
        took = time.perf_counter() - start
        if took > QUICK:
            break
    return took


def interleave(arms: dict[str, Callable[[], Any]], seconds: float) -> dict[str, list[Any]]:
    """Call all arms in turn, each as often as its share of the seconds allows, and return what each returned."""
    share = seconds / len(arms)
    rounds = {name: max(FEWEST_ROUNDS, min(MOST_ROUNDS, int(share / warm(arm)))) for name, arm in arms.items()}
    found: dict[str, list[Any]] = {name: [] for name in arms}
    most = max(rounds.values())
    for turn in range(most):
        for name, arm in arms.items():
            if (turn + 1) * rounds[name] // most > len(found[name]):
                found[name].append(arm())
    return found


def quartiles(values: list[float]) -> list[float]:
    """Return the first quartile, the median and the third quartile."""
    return [round(value, 4) for value in statistics.quantiles(values, n=4, method="inclusive")]


def measure(arms: dict[str, nn.Module], x: Tensor, seconds: float) -> dict[str, dict[str, Any]]:
    """Return, by arm, quartiles of the milliseconds of forward, and of forward and backward, and memory."""
    x, gradient = x.detach().requires_grad_(), torch.randn_like(x)
    times = interleave({name: (lambda arm=arm: step(arm, x, gradient)) for name, arm in arms.items()}, seconds)
    figures = {}
    for name, arm in arms.items():
        forward, both = (quartiles(list(each)) for each in zip(*times[name], strict=True))
        held, peak = memory(arm, x, gradient)
        of_memory = {"held_mb": held / 1e6, "peak_mb": peak / 1e6}
        figures[name] = {"forward_ms": forward, "ms": both, "rounds": len(times[name]), **of_memory}
    return figures


def memory(arm: nn.Module, x: Tensor, gradient: Tensor) -> tuple[int, int]:
    """Return the bytes that a step keeps for backward, and the most that it needs above what was there before.

    What is kept excludes the parameters, the tokens and the output; the peak has the gradients of all of them.
    """
    arm.zero_grad()
    x.grad = None
    kept = Kept()
    with Peak(x.device) as peak:
        with torch.autograd.graph.saved_tensors_hooks(kept.pack, lambda tensor: tensor):
            output = arm(x)
        kept.forget([*arm.parameters(), *arm.buffers(), x, output])
        output.backward(gradient)
    return kept.bytes, peak.bytes


class Kept:
    """Counts the storages that autograd saves, each once."""

    def __init__(self) -> None:
        self.saved: dict[int, tuple[int, Tensor]] = {}
        self.bytes = 0

    def pack(self, tensor: Tensor) -> Tensor:
        """Note a storage, and keep it, so that no other takes its address."""
        self.saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes(), tensor.detach()
        return tensor

    def forget(self, others: list[Tensor]) -> None:
        """End counting; what others hold anyway does not count."""
        for tensor in others:
            self.saved.pop(tensor.untyped_storage().data_ptr(), None)
        self.bytes = sum(size for size, _ in self.saved.values())
        self.saved.clear()


class Peak:
    """Counts the most bytes that are allocated at once: CUDA's allocator knows, and on a CPU torch's profiler."""

    def __init__(self, device: torch.device) -> None:
        self.cuda, self.bytes = device.type == "cuda", 0
        self.profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True)

    def __enter__(self) -> "Peak":
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
            self.bytes = -torch.cuda.memory_allocated()
        else:
            self.profiler.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        if self.cuda:
            self.bytes += torch.cuda.max_memory_allocated()
            return
        self.profiler.__exit__(*error)
        events = [event for event in self.profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
        now = 0
        for event in sorted(events, key=lambda event: event.start_ns()):
            now += event.nbytes()
            self.bytes = max(self.bytes, now)


def kernels(arm: nn.Module, x: Tensor, rows: int = 14) -> dict[str, float]:
    """Return the milliseconds of a step's longest kernels on a CUDA device, by name."""
    x, gradient = x.detach().requires_grad_(), torch.randn_like(x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        step(arm, x, gradient)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_device_time_total)
    return {event.key[:60]: round(event.self_device_time_total / 1e3, 3) for event in events[:rows]}
