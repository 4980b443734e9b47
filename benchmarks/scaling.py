"""Time training steps of a layer of many experts, the optimizer's included: ``python -m benchmarks.scaling``.

Every expert gets 64 assignments on average, so the batch grows with the experts, and a token should cost the same. Two
routers choose among the same experts: a gate with a logit for every expert, and product keys.
"""

import gc
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.command import chosen, parser
from benchmarks.compare import say
from benchmarks.results import record
from benchmarks.timing import Watch, interleave, quartiles, step
from gatewright import GroupedFeedForward, MoE, ProductKey, Router, TopK

ROUTERS: dict[str, Callable[[int], Router]] = {
    "top-k": lambda num_experts: TopK(DIM, num_experts, TOP_K, score_after_top_k=True),
    "product keys": lambda num_experts: ProductKey(DIM, num_experts, TOP_K),
}
DIM, FFN, TOP_K, ASSIGNMENTS = 256, 512, 2, 64
CASES, QUICK = [64, 256, 1024, 2048, 4096], 8
OPTIMIZERS: dict[str, tuple[int, Callable[..., torch.optim.Optimizer]]] = {
    "SGD": (2, partial(torch.optim.SGD, lr=1e-9, foreach=False)),
    "AdamW, fused": (4, partial(torch.optim.AdamW, lr=1e-9, fused=True)),
    "AdamW, foreach": (6, partial(torch.optim.AdamW, lr=1e-9, foreach=True)),
}
"""Each with how many times the parameters it needs in memory: they, their gradients, its state and copies."""


def available(device: str) -> float:
    """Return how many bytes are free."""
    if device == "cuda":
        return float(torch.cuda.mem_get_info()[0])
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 8e9)


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """Time something from an idle device to an idle device."""
    watch = Watch(device)
    watch.wait()
    start = watch.mark()
    run()
    end = watch.mark()
    watch.wait()
    return watch.milliseconds(start, end)


def router_step(layer: MoE, x: Tensor) -> None:
    """Route forward and backward."""
    routing = layer.router(x)
    torch.autograd.backward([routing.weight.sum()])


def measure_experts(num_experts: int, device: str, seconds: float) -> dict[str, Any]:
    """Return the milliseconds of layers, of their routers alone and of optimizers, as far as memory allows."""
    torch.manual_seed(0)
    tokens = ASSIGNMENTS * num_experts // TOP_K
    size = 4.0 * num_experts * 2 * DIM * FFN
    free, rows = available(device), 4.0 * tokens * TOP_K * (2 * DIM + 3 * FFN)
    logits = {"top-k": 6 * 4.0 * tokens * num_experts, "product keys": 0.0}
    found: dict[str, Any] = {"experts": num_experts, "tokens": tokens, "ms": {}, "left_out": {}}
    experts = GroupedFeedForward(num_experts, DIM, FFN).to(device)
    x, gradient = torch.randn(2, tokens, DIM, device=device)
    x.requires_grad_()
    parts: dict[str, Callable[[], float]] = {}
    for name, make_router in ROUTERS.items():
        needed = 2 * size + rows + logits[name]
        if needed > free:
            found["left_out"][f"layer, {name}"] = f"it needs {needed / 1e9:.0f} GB of {free / 1e9:.0f} GB free"
            continue
        layer = MoE(make_router(num_experts), experts, losses={}).to(device)
        parts[f"layer, {name}"] = lambda layer=layer: step(layer, x, gradient)[1]
        parts[f"router, {name}"] = lambda layer=layer: milliseconds(lambda: router_step(layer, x), x.device)
    found["ms"] = {name: quartiles(times) for name, times in interleave(parts, seconds).items()} if parts else {}
    for name, (copies, make) in OPTIMIZERS.items():
        gc.collect()
        if copies * size > free:
            found["left_out"][name] = f"it needs {copies * size / 1e9:.0f} GB of {free / 1e9:.0f} GB free"
            continue
        found["ms"][name] = optimizer_quartiles(make(experts.parameters()), x.device, seconds / 2)
    return found


def optimizer_quartiles(optimizer: torch.optim.Optimizer, device: torch.device, seconds: float) -> list[float]:
    """Time the step of an optimizer with the gradients that are there."""
    times = interleave({"step": lambda: milliseconds(optimizer.step, device)}, seconds)
    return quartiles(times["step"])


def main() -> None:
    """Measure what was asked for."""
    asked = parser("benchmarks.scaling", __doc__, seconds=8.0).parse_args()
    for num_experts in chosen(asked, CASES, QUICK):
        found = measure_experts(num_experts, asked.device, asked.seconds)
        say(num_experts, "experts", found["ms"], found["left_out"] or "")
        record("scaling", str(num_experts), asked.device, found, asked.output)


if __name__ == "__main__":
    main()
