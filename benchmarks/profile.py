"""Where the time of our layer goes: every operation's time beside what its sums and its bytes must take.

The limits are measured on the same machine: the best rate of a large matrix product, and of a copy in memory.
"""

import time
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from benchmarks.arms import gatewright
from benchmarks.cases import Case, make_items, make_weights
from benchmarks.compare import say
from benchmarks.timing import Watch, step

ROUNDS = 5


class Operations(TorchDispatchMode):
    """Times every operation that torch runs, and counts its arithmetic and the bytes that it reads and writes."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.watch = Watch(device)
        self.found: dict[str, dict[str, float]] = defaultdict(
            lambda: dict.fromkeys(("calls", "ms", "flop", "bytes"), 0)
        )

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operation; one that only looks at memory in another way counts neither time nor bytes."""
        kwargs = kwargs or {}
        self.watch.wait()
        start = time.perf_counter()
        output = func(*args, **kwargs)
        self.watch.wait()
        seconds = time.perf_counter() - start
        read, written = storages((args, kwargs)), storages(output)
        if func.is_view:
            return output
        entry = self.found[func.overloadpacket.__name__]
        entry["calls"] += 1
        entry["ms"] += seconds * 1e3
        entry["bytes"] += sum((read | written).values())
        entry["flop"] += arithmetic(func, args, kwargs, output)
        return output


def arithmetic(func: Any, args: Any, kwargs: Any, output: Any) -> float:
    """Return how many operations a product takes; others take none that count."""
    if func is torch.ops.aten._grouped_mm.default:  # Torch's own table does not have it.
        return 2.0 * args[0].numel() * args[1].shape[-1]
    count = flop_registry.get(func.overloadpacket)
    return float(count(*args, **kwargs, out_val=output)) if count else 0.0


def storages(tree: Any) -> dict[int, int]:
    """Return the bytes of every tensor in a tree by its address."""
    return {each.data_ptr(): each.nbytes for each in tree_leaves(tree) if isinstance(each, Tensor)}


def best(run: Any, device: torch.device, rounds: int = ROUNDS) -> float:
    """Return the least seconds that something takes."""
    watch, seconds = Watch(device), []
    for _ in range(rounds):
        watch.wait()
        start = time.perf_counter()
        run()
        watch.wait()
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def limits(like: Tensor) -> tuple[float, float]:
    """Return the FLOP/s of a large product in a tensor's dtype, and the bytes per second of a copy, read and write."""
    left, right = (torch.randn(2048, 2048, device=like.device).to(like.dtype) for _ in range(2))
    source = torch.zeros(64 * 2**20, device=like.device)
    target = torch.empty_like(source)
    product = 2 * 2048**3 / best(lambda: left @ right, like.device)
    return product, 2 * source.nbytes / best(lambda: target.copy_(source), like.device)


def profile(case: Case, dtype: torch.dtype, device: str, seconds: float) -> dict[str, Any]:
    """Print and return each operation of a step of our layer: calls, ms, and the ms that the limits allow."""
    weights = make_weights(case, device, dtype)
    layer, x = gatewright(case, weights), make_items(case, weights.gate).requires_grad_()
    gradient = torch.randn_like(x)
    flop_rate, byte_rate = limits(x)
    whole = min(step(layer, x, gradient)[1] for _ in range(ROUNDS))
    with torch.autograd.set_multithreading_enabled(False), Operations(x.device) as operations:
        for _ in range(ROUNDS):
            step(layer, x, gradient)
    rows = []
    for name, entry in sorted(operations.found.items(), key=lambda item: -item[1]["ms"]):
        calls, ms, flop, moved = (value / ROUNDS for value in entry.values())
        least = max(flop / flop_rate, moved / byte_rate) * 1e3
        rows.append({"op": name, "calls": calls, "ms": ms, "gflop": flop / 1e9, "mb": moved / 1e6, "least_ms": least})
    say(f"  {flop_rate / 1e9:.0f} GFLOP/s, {byte_rate / 1e9:.1f} GB/s, a step {whole:.2f} ms")
    for row in rows[:14]:
        say(f"  {row['op']:<34}" + " ".join(f"{key} {value:.2f}" for key, value in row.items() if key != "op"))
    return {"gflops": flop_rate / 1e9, "gbps": byte_rate / 1e9, "step_ms": whole, "operations": rows}
