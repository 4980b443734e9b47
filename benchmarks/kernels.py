"""What has to hold on a CUDA device before a speed counts: numbers, bits, graphs, and no waiting for the device."""

import math
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from benchmarks.arms import gatewright
from benchmarks.cases import Case, make_weights
from gatewright.kernels import launch, plain

TOLERANCE = {torch.bfloat16: 1.5e-2, torch.float16: 3e-3}
SHAPES = [
    (Case(1000, 256, 192, 8, 2), False),
    (Case(4096, 512, 1024, 8, 2), False),
    (Case(333, 72, 40, 5, 5), False),  # sizes that no block divides, and every expert for every token
    (Case(700, 128, 192, 8, 1), True),  # one expert takes all, the others are empty
    (Case(1, 64, 64, 4, 2), False),
    (Case(0, 64, 64, 4, 2), False),
]
KINDS = [(torch.bfloat16, "gelu"), (torch.bfloat16, "relu"), (torch.float16, "swiglu")]
CHECKS = [(shape, torch.bfloat16, "swiglu") for shape in SHAPES] + [(SHAPES[0], *kind) for kind in KINDS]
LAYER = Case(1000, 256, 384, 8, 2)


def kernels() -> Iterator[tuple[str, float, bool]]:
    """Yield the largest difference of each kernel from its plain twin in float64, over the largest value."""
    for (case, one), dtype, activation in CHECKS:
        exact, found = (steps(case, one, activation, dtype, module) for module in (plain, launch))
        for name, compute in found.items():
            difference = max(map(relative, attempt(compute), exact[name]()), default=math.inf)
            yield f"{case} {activation} {dtype} {name}", difference, difference <= TOLERANCE[dtype]


def attempt(compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Run a kernel; one that fails is printed, and does not keep the others from being checked."""
    try:
        return compute()
    except Exception:
        traceback.print_exc()
        return ()


def steps(
    case: Case, one: bool, activation: str, dtype: torch.dtype, kernels: Any
) -> dict[str, Callable[[], tuple[Tensor, ...]]]:
    """Return every kernel by name, all on the same inputs; the plain twins in float64."""
    torch.manual_seed(0)
    weights = make_weights(case, dtype=dtype)
    up = weights.up if activation == "swiglu" else weights.up[:, :, : case.ffn].contiguous()
    x, gradient = torch.randn(2, case.tokens, case.dim, device="cuda").to(dtype)
    expert = torch.rand(case.tokens, case.experts, device="cuda").argsort(1)[:, : case.top_k].t().flatten()
    expert = torch.full_like(expert, case.experts // 2) if one else expert
    order = expert.argsort(stable=True)
    token, row_index = order % max(case.tokens, 1), order.argsort().view(case.top_k, case.tokens)
    ends = torch.bincount(expert, minlength=case.experts).cumsum(0, dtype=torch.int32)
    weight = torch.rand(len(order), device="cuda")
    hidden, rows = (torch.randn(len(order), size, device="cuda").to(dtype) for size in (up.shape[2], case.ffn))
    if kernels is plain:
        x, gradient, up, weight, hidden, rows = (t.double() for t in (x, gradient, up, weight, hidden, rows))
    down = weights.down.to(x.dtype)
    return {
        "up": lambda: up_and_hidden(kernels, x, up, weight, token, ends, activation),
        "grouped": lambda: (kernels.grouped(rows, down, ends),),
        "grouped, transposed": lambda: (kernels.grouped(hidden, up.transpose(1, 2), ends),),
        "gather_sum": lambda: (kernels.gather_sum(x[token], row_index),),
        "down_backward": lambda: kernels.down_backward(gradient, down, hidden, weight, token, ends, activation),
        "weight_gradient, left": lambda: (kernels.weight_gradient(x, hidden, token, ends, "left"),),
        "weight_gradient, right": lambda: (kernels.weight_gradient(rows, gradient, token, ends, "right"),),
    }


def up_and_hidden(kernels: Any, x: Tensor, up: Tensor, *others: Any) -> tuple[Tensor, Tensor]:
    """Return the hidden values that a kernel saves, and what it returns."""
    hidden = x.new_empty(others[1].shape[0], up.shape[2])
    return hidden, kernels.up(x, up, *others, hidden)


def relative(found: Tensor, exact: Tensor) -> float:
    """Largest difference over the largest value; infinite where there is NaN."""
    if not exact.numel():
        return 0.0
    found, exact = found.detach().double(), exact.detach().double()
    difference = (found - exact).abs().nan_to_num(nan=math.inf)
    return float(difference.max() / exact.abs().max().clamp(min=1e-9))


def layer() -> bool:
    """Whether outputs and gradients of a layer in bfloat16 are near those of the way by rows in float64."""
    weights = make_weights(LAYER)
    found = gatewright(LAYER, weights, "triton")
    exact = gatewright(LAYER, weights, None, rows=True).double()
    x = torch.randn(LAYER.tokens, LAYER.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    return max(map(relative, step(found, x), step(exact, x.detach().double().requires_grad_()))) < 3e-2


def never_waits() -> bool:
    """Whether a step never asks the device for a value."""
    layer = gatewright(LAYER, make_weights(LAYER), "triton")
    x = torch.randn(LAYER.tokens, LAYER.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    step(layer, x)
    torch.cuda.set_sync_debug_mode("error")
    try:
        step(layer, x)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return True


def same_bits(runs: int = 20) -> bool:
    """Whether outputs and gradients of a layer have the same bits in every run."""
    layer = gatewright(LAYER, make_weights(LAYER), "triton")
    x = torch.randn(LAYER.tokens, LAYER.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    first = step(layer, x)
    return all(all(map(torch.equal, first, step(layer, x))) for _ in range(runs))


def captured() -> bool:
    """Whether a step is captured as a CUDA graph, never waiting for the device, and replays on other values."""
    layer = gatewright(LAYER, make_weights(LAYER), "triton")
    x = torch.randn(LAYER.tokens, LAYER.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step(layer, x)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step(layer, x)
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    return max(map(relative, replayed, step(layer, x))) < 1e-2


def step(layer: torch.nn.Module, x: Tensor) -> tuple[Tensor, ...]:
    """Output, and gradients of the input and of every parameter."""
    output = layer(x)
    return output, *torch.autograd.grad(output.float().square().sum(), [x, *layer.parameters()])


OF_A_LAYER = (layer, same_bits, never_waits, captured)
"""What is checked of a whole layer with the Triton kernels."""
