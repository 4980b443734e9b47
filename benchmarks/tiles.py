"""Timings of each kernel alone for several tile sizes, from which its fixed table is set."""

from collections.abc import Callable, Iterator
from functools import partial

import torch

from benchmarks.cases import Case, make_weights
from gatewright.kernels import launch
from gatewright.kernels.launch import Tiles

LAUNCHES = 5
CANDIDATES: dict[str, list[Tiles | None]] = {
    "up": [None, Tiles(128, 128, 64, 8, 4), Tiles(128, 64, 64, 8, 4), Tiles(64, 128, 64, 4, 4)],
    "grouped": [None, Tiles(128, 128, 64, 8, 4), Tiles(128, 256, 64, 8, 3), Tiles(64, 128, 64, 4, 4)],
    "grouped, transposed": [None, Tiles(128, 128, 64, 8, 4), Tiles(128, 256, 64, 8, 3), Tiles(64, 128, 64, 4, 4)],
    "down_backward": [None, Tiles(128, 64, 64, 8, 4), Tiles(64, 64, 64, 4, 4), Tiles(64, 128, 64, 8, 3)],
    "weight_gradient, left": [None, Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 32, 4, 4)],
    "weight_gradient, right": [None, Tiles(128, 256, 64, 8, 3), Tiles(128, 128, 64, 8, 3), Tiles(128, 128, 32, 4, 4)],
}
"""Sizes by kernel; None stands for the table's."""


def timings(case: Case) -> Iterator[tuple[str, list[str]]]:
    """Yield, for each kernel of a case, the milliseconds of each candidate, or how it failed."""
    for name, run in kernels(case).items():
        found = []
        for tiles in CANDIDATES[name]:
            label = "table" if tiles is None else "/".join(map(str, tiles))
            try:
                found.append(f"{label} {milliseconds(partial(run, tiles=tiles)):.3f}")
            except Exception as error:
                found.append(f"{label} {type(error).__name__}")
        yield name, found


def kernels(case: Case) -> dict[str, Callable[..., object]]:
    """Return each kernel on inputs like a layer's, with only the tiles left open."""
    weights, half = make_weights(case), partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    x, gradient = half(case.tokens, case.dim), half(case.tokens, case.dim)
    expert = (x @ weights.gate).topk(case.top_k).indices.t().flatten()
    order = expert.argsort(stable=True)
    token, weight = order % case.tokens, torch.rand(len(order), device="cuda")
    ends = torch.bincount(expert, minlength=case.experts).cumsum(0, dtype=torch.int32)
    hidden, rows = half(len(order), 2 * case.ffn), half(len(order), case.ffn)
    return {
        "up": partial(launch.up, x, weights.up, weight, token, ends, "swiglu", torch.empty_like(hidden)),
        "grouped": partial(launch.grouped, rows, weights.down, ends),
        "grouped, transposed": partial(launch.grouped, hidden, weights.up.transpose(1, 2), ends),
        "down_backward": partial(launch.down_backward, gradient, weights.down, hidden, weight, token, ends, "swiglu"),
        "weight_gradient, left": partial(launch.weight_gradient, x, hidden, token, ends, "left"),
        "weight_gradient, right": partial(launch.weight_gradient, rows, gradient, token, ends, "right"),
    }


def milliseconds(run: Callable[[], object]) -> float:
    """Time a kernel on the device; the host runs ahead of it meanwhile."""
    run()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000)
    start.record()
    for _ in range(LAUNCHES):
        run()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end) / LAUNCHES
