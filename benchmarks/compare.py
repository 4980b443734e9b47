"""Build arms, check their numbers, time those that hold, and print as it goes."""

import gc
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.arms import LeftOutError, Routed
from benchmarks.parity import TOLERANCE, Trace, clear_tokens, trace
from benchmarks.timing import measure

START = time.monotonic()


def since_start() -> float:
    """Return the seconds since the program began."""
    return time.monotonic() - START


def say(*parts: object) -> None:
    """Print at once, with the seconds since the start."""
    print(f"[{since_start():5.1f}s]", *parts, flush=True)


def compare(
    arms: dict[str, Callable[[], nn.Module]], loop: Routed, x: Tensor, seconds: float, unchecked: str = "dense"
) -> dict[str, Any]:
    """Return figures by arm: memory and times, or why there are none.

    Args:
        arms: What builds each arm.
        loop: The module loop, whose numbers are the right ones: in float64, where that does not take too long.
        x: Items of all arms.
        seconds: How long to time all arms together.
        unchecked: The arm that computes something else.
    """
    clear = clear_tokens(loop, x, x.dtype)
    gradient = torch.randn_like(x)
    exact = trace(loop, x.to(loop.gate.dtype), gradient.to(loop.gate.dtype), clear)
    found: dict[str, dict[str, Any]] = {name: {} for name in arms}
    built = {}
    for name, build in arms.items():
        arm = attempt(lambda build=build: build(), found[name])
        if arm is None or name == unchecked or holds(arm, exact, (x, gradient, clear), found[name]):
            built |= {} if arm is None else {name: arm}
    for name, figures in measure(built, x, seconds).items():
        found[name] |= figures
    for name, figures in found.items():
        say(f"  {name:<26}", line(figures))
    gc.collect()
    return found


def attempt(make: Callable[[], Any], found: dict[str, Any]) -> Any:
    """Return what is made, or None where it is left out or fails, and note why."""
    try:
        return make()
    except (LeftOutError, ImportError) as error:
        found["left_out"] = "not installed" if isinstance(error, ImportError) else str(error)
    except Exception as error:
        traceback.print_exc()
        found["left_out"] = f"fails: {type(error).__name__}"
    return None


def holds(arm: nn.Module, exact: Trace, inputs: tuple[Tensor, Tensor, Tensor], found: dict[str, Any]) -> bool:
    """Note how far an arm is from the right numbers, and return whether it is near enough to be timed."""
    traced = attempt(lambda: trace(arm, *inputs), found)
    if traced is None:
        return False
    found["difference"] = traced.difference(exact)
    found["parity"] = found["difference"] <= TOLERANCE[inputs[0].dtype]
    return found["parity"]


def line(figures: dict[str, Any]) -> str:
    """Show an arm's figures, or why it has none."""
    if "ms" not in figures:
        return figures.get("left_out") or f"parity fails: {figures['difference']:.1e}"
    (low, middle, high), forward = figures["ms"], figures["forward_ms"][1]
    difference = f"{figures['difference']:.0e}" if "difference" in figures else "none"
    return (
        f"{middle:9.2f} ms ({low:.2f} to {high:.2f}, {figures['rounds']} rounds), forward {forward:.2f}, "
        f"held {figures['held_mb']:.1f} MB, peak {figures['peak_mb']:.1f} MB, difference {difference}"
    )
