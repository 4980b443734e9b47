"""What each process of `plan_check` times: the machine's rates, then a mixture layer's training step."""

import statistics
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from gatewright import GroupedFeedForward, MoE, TopK, aux_loss
from gatewright.parallel import average_expert_gradients, expert_mesh, expert_parameters, parallelize, sum_in_place

TOKENS, DIM, FFN, NUM_EXPERTS, TOP_K = 4096, 256, 512, 8, 2
REPEATS = 15


def measure(ep_size: int) -> dict[str, float]:
    """Return this process's rates and its step time, medians of interleaved runs, while the others do the same."""
    world = dist.get_world_size()
    rows = torch.randn(TOKENS // world * TOP_K // NUM_EXPERTS * ep_size, DIM)  # of one expert
    weight, out = torch.randn(DIM, FFN), torch.empty(len(rows), FFN)
    a, b = torch.randn(8_000_000), torch.randn(8_000_000)
    small, large = torch.zeros(world, 1), torch.zeros(world, TOKENS // world * TOP_K // world * DIM)  # a step's trip
    seconds = _medians(
        {
            "matmul": lambda: [torch.mm(rows, weight, out=out) for _ in range(16)],
            "add": lambda: a.add_(b),
            "small": lambda: _exchange(small),
            "large": lambda: _exchange(large),
            "step": _training_step(ep_size),
        }
    )
    travel = max(seconds["large"] - seconds["small"], 1e-9)
    return {
        "flops": 16 * 2 * len(rows) * DIM * FFN / seconds["matmul"],
        "memory_bandwidth": 12 * len(a) / seconds["add"],  # two read, one written
        "latency": seconds["small"] / (world - 1) if world > 1 else 0.0,
        "bandwidth": large.nbytes * (world - 1) / world / travel if world > 1 else 1e12,
        "step": seconds["step"],
    }


def _training_step(ep_size: int) -> Callable[[], None]:
    torch.manual_seed(0)
    mesh = expert_mesh(ep_size)
    layer = MoE(TopK(DIM, NUM_EXPERTS, TOP_K), GroupedFeedForward(NUM_EXPERTS, DIM, FFN))
    parallelize(layer, mesh)
    optimizer = torch.optim.AdamW(layer.parameters())
    torch.manual_seed(1 + dist.get_rank())
    items = torch.randn(TOKENS // mesh.size(), DIM, requires_grad=True)
    everyone = dist.group.WORLD
    assert everyone is not None

    def step() -> None:
        optimizer.zero_grad()
        (layer(items).square().mean() + aux_loss(layer)).backward()
        average_expert_gradients(layer, mesh)
        spread = {name for name, _ in expert_parameters(layer)}
        dense = (p.grad for name, p in layer.named_parameters() if name not in spread)
        sum_in_place([gradient for gradient in dense if gradient is not None], everyone)
        optimizer.step()

    return step


def _exchange(rows: Tensor) -> None:
    dist.all_to_all_single(torch.empty_like(rows), rows)


def _medians(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Time each in turn, over and over, so that what else the machine does meets all of them."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(2 + REPEATS):
        for name, run in runs.items():
            dist.barrier()
            began = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - began)
    return {name: statistics.median(found[2:]) for name, found in times.items()}  # the first two warm up
