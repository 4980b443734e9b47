"""What is asked of a CUDA device alone: the numbers of kernels, their tiles, and torch.compile."""

import gc
import traceback
from collections.abc import Callable

import torch

from benchmarks import kernels, timing
from benchmarks.arms import gatewright
from benchmarks.cases import CASES, make_items, make_weights
from benchmarks.compare import line, say, since_start
from benchmarks.tiles import timings

COMPILED = [CASES["cuda"][1], CASES["cuda"][7]]


def parity_holds() -> bool:
    """Print what differs from the plain twins, and whether all of it may."""
    checked = list(kernels.kernels())
    bad = [(name, difference) for name, difference, fine in checked if not fine]
    say(f"kernels: {len(checked)} checks, largest difference {max(each[1] for each in checked):.2e}, {len(bad)} wrong")
    for name, difference in bad:
        say("WRONG", name, f"{difference:.2e}")
    return all([not bad, *(holds(check) for check in kernels.OF_A_LAYER)])


def holds(check: Callable[[], bool]) -> bool:
    """Print what a check of a layer says, or how it failed."""
    try:
        found = check()
    except Exception:
        traceback.print_exc()
        found = False
    say(check.__name__, found)
    return found


def time_tiles(budget: float) -> None:
    """Print what other tile sizes would take, kernel by kernel."""
    for case in CASES["cuda"]:
        if since_start() > budget:
            say("Out of time before tiles of", case)
            return
        for name, found in timings(case):
            say("tiles", case, f"{name:<23}", "  ".join(found))
        gc.collect()
        torch.cuda.empty_cache()


def time_compiled(budget: float) -> None:
    """Print what `torch.compile` makes of the layer, beside the layer itself, and the layer's longest kernels."""
    for case in COMPILED:
        if since_start() > budget:
            say("Out of time before", case, "compiled")
            return
        weights = make_weights(case)
        layer, x = gatewright(case, weights), make_items(case, weights.gate)
        try:
            found = timing.measure({"plain": layer, "compiled": torch.compile(layer, fullgraph=True)}, x, seconds=2.0)
        except Exception:
            traceback.print_exc()
            continue
        for name, figures in found.items():
            say(case, f"{name:<18}", line(figures))
        say("longest kernels, ms:", timing.kernels(layer, x))
