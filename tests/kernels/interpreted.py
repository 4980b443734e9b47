"""Compare every Triton kernel with its plain twin, in Triton's interpreter; run by `test_launch.py`."""

import torch
from torch.testing import assert_close

from gatewright.kernels import launch, plain

SHAPES = {
    "usual": (50, 32, 48, 4, 2, None),
    "odd sizes, k = E": (33, 18, 10, 3, 3, None),
    "one expert has all": (40, 16, 16, 4, 1, 2),
    "one token": (1, 16, 16, 4, 2, None),
    "no tokens": (0, 16, 16, 4, 2, None),
    "tiles of many rows": (1100, 16, 264, 2, 1, None),
}


def inputs(tokens, dim, ffn, experts, top_k, only, activation):
    expert = torch.rand(tokens, experts).argsort(1)[:, :top_k].t().flatten()
    expert = expert if only is None else torch.full_like(expert, only)
    order = expert.argsort(stable=True)
    width = 2 * ffn if activation == "swiglu" else ffn
    return {
        "x": torch.randn(tokens, dim),
        "gradient": torch.randn(tokens, dim),
        "weight_in": torch.randn(experts, dim, width) / dim**0.5,
        "weight_out": torch.randn(experts, ffn, dim) / ffn**0.5,
        "hidden": torch.randn(len(order), width),
        "rows": torch.randn(len(order), ffn),
        "weight": torch.rand(len(order)),
        "token": order % max(tokens, 1),
        "row_index": order.argsort().view(top_k, tokens),
        "ends": torch.bincount(expert, minlength=experts).cumsum(0, dtype=torch.int32),
    }


def products(kernels, activation, *, x, gradient, weight_in, weight_out, hidden, rows, weight, token, row_index, ends):
    saved = torch.empty_like(hidden)
    return {
        "up": kernels.up(x, weight_in, weight, token, ends, activation, saved),
        "up, what it saves": saved,
        "up without saving": kernels.up(x, weight_in, weight, token, ends, activation, None),
        "grouped": kernels.grouped(rows, weight_out, ends),
        "grouped, transposed": kernels.grouped(hidden, weight_in.transpose(1, 2), ends),
        "gather_sum": kernels.gather_sum(x[token], row_index),
        "down_backward": kernels.down_backward(gradient, weight_out, hidden, weight, token, ends, activation),
        "weight_gradient, left": kernels.weight_gradient(x, hidden, token, ends, "left"),
        "weight_gradient, right": kernels.weight_gradient(rows, gradient, token, ends, "right"),
    }


if __name__ == "__main__":
    torch.manual_seed(0)
    for shape, activation in [*((shape, "swiglu") for shape in SHAPES), ("usual", "gelu"), ("usual", "relu")]:
        given = inputs(*SHAPES[shape], activation)
        print(f"{shape}, {activation}", flush=True)
        found, wanted = (products(kernels, activation, **given) for kernels in (launch, plain))
        assert_close(found, wanted, rtol=1e-4, atol=1e-4)
