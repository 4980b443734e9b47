"""What the Triton kernels compute, in plain torch: the back-end `torch`, on any device."""

from collections.abc import Sequence
from itertools import groupby
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Activation = Literal["gelu", "relu", "swiglu"]


def activate(hidden: Float[Tensor, "*rows hidden"], activation: str) -> Float[Tensor, "*rows ffn"]:
    """Apply an activation; SwiGLU takes the gate from the first half of the hidden values."""
    if activation == "swiglu":
        gate, lift = hidden.chunk(2, dim=-1)
        return F.silu(gate) * lift
    return F.gelu(hidden) if activation == "gelu" else F.relu(hidden)


def up(
    x: Float[Tensor, "tokens dim"],
    weight_in: Float[Tensor, "experts dim hidden"],
    weight: Float[Tensor, " assignments"],
    token_index: Int[Tensor, " assignments"],
    ends: Int[Tensor, " experts"],
    activation: str,
    hidden: Float[Tensor, "assignments hidden"] | None,
) -> Float[Tensor, "assignments ffn"]:
    """Write ``x[token] W_in`` into `hidden`, if it is to be saved, and return ``weight * activation(hidden)``."""
    hidden = grouped(x.index_select(0, token_index), weight_in, ends, hidden)
    return _weigh_exactly(activate(hidden, activation), weight)


def grouped(
    rows: Float[Tensor, "assignments inner"],
    matrices: Float[Tensor, "experts inner out"],
    ends: Int[Tensor, " experts"],
    out: Float[Tensor, "assignments out"] | None = None,
) -> Float[Tensor, "assignments out"]:
    """Multiply the rows of each expert by its matrix, into `out` if it is given; every row is some expert's."""
    if _torch_takes(rows, *matrices.shape[1:]):
        product = F.grouped_mm(rows, matrices, offs=ends)
        return product if out is None else out.copy_(product)
    product = rows.new_empty(rows.shape[0], matrices.shape[2]) if out is None else out
    runs = _runs(ends)
    for left, matrix, out in zip(_by_run(rows, runs), _of_run(matrices, runs), _by_run(product, runs), strict=True):
        torch.bmm(left, matrix, out=out)
    return product


def gather_sum(
    rows: Float[Tensor, "assignments dim"], row_index: Int[Tensor, "top_k tokens"]
) -> Float[Tensor, "tokens dim"]:
    """Add up each token's rows in at least float32; on a CPU in one pass."""
    if rows.device.type == "cpu":
        return F.embedding_bag(row_index.t().contiguous(), rows, mode="sum")
    return rows[row_index].sum(0, dtype=torch.promote_types(rows.dtype, torch.float32)).to(rows.dtype)


def down_backward(
    gradient: Float[Tensor, "tokens dim"],
    weight_out: Float[Tensor, "experts ffn dim"],
    hidden: Float[Tensor, "assignments hidden"],
    weight: Float[Tensor, " assignments"],
    token_index: Int[Tensor, " assignments"],
    ends: Int[Tensor, " experts"],
    activation: str,
) -> tuple[Float[Tensor, "assignments hidden"], Float[Tensor, "assignments ffn"], Float[Tensor, " assignments"]]:
    """Go back through the second product and the activation, which is computed again.

    Returns:
        The gradient of the hidden values, the weighted activations, and the gradient of the weights: with
        ``s = gradient[token] W_out^T``, the sum of ``s * activation(hidden)`` over each row.
    """
    slope = grouped(gradient.index_select(0, token_index), weight_out.transpose(1, 2), ends)
    hidden_gradient, activated = _activate_backward(slope, hidden, activation)
    weight_gradient = slope.mul_(activated).sum(-1).to(weight.dtype)
    return _weigh(hidden_gradient, weight), _weigh(activated, weight), weight_gradient


def weight_gradient(
    left: Float[Tensor, "left_rows height"],
    right: Float[Tensor, "right_rows width"],
    token_index: Int[Tensor, " assignments"],
    ends: Int[Tensor, " experts"],
    gathered: str,
    out: Float[Tensor, "experts height width"] | None = None,
) -> Float[Tensor, "experts height width"]:
    """Sum the outer products of each expert's rows, into `out` if it is given.

    One side, named by `gathered`, is in the order of tokens.
    """
    if gathered == "left":
        left = left.index_select(0, token_index)
    else:
        right = right.index_select(0, token_index)
    out = left.new_empty(ends.shape[0], left.shape[1], right.shape[1]) if out is None else out
    if _torch_takes(left, left.shape[1], right.shape[1]):
        return out.copy_(F.grouped_mm(left.t(), right, offs=ends))
    runs = _runs(ends)
    for one, other, product in zip(_by_run(left, runs), _by_run(right, runs), _of_run(out, runs), strict=True):
        torch.bmm(one.transpose(1, 2), other, out=product)
    return out


def _torch_takes(rows: Tensor, *sizes: int) -> bool:
    """Torch's grouped GEMM wants bfloat16 rows of 16 bytes; on a CPU it is a loop, for which nothing is gained."""
    aligned = all(size * rows.element_size() % 16 == 0 for size in sizes)
    return rows.device.type != "cpu" and rows.dtype == torch.bfloat16 and aligned and rows.shape[0] > 0


def experts_per_product(rows_per_expert: float) -> int:
    """Return how many experts' rows are multiplied in one batched product at most, which takes longer beyond."""
    return max(8, int(1024 / max(rows_per_expert, 1)))


def _runs(ends: Tensor) -> list[tuple[int, int]]:
    """Return the runs of experts with as many rows each, as how many they are and how many rows each has."""
    runs: list[tuple[int, int]] = []
    for length, experts in groupby(ends.diff(prepend=ends.new_zeros(1)).tolist()):
        most, count = experts_per_product(length), len(list(experts))
        runs += [(min(most, left), length) for left in range(count, 0, -most)]
    return runs


def _by_run(rows: Tensor, runs: list[tuple[int, int]]) -> list[Tensor]:
    parts = rows.split([experts * length for experts, length in runs])
    return [part.view(*run, rows.shape[1]) for part, run in zip(parts, runs, strict=True)]


def _of_run(matrices: Tensor, runs: list[tuple[int, int]]) -> Sequence[Tensor]:
    parts: Sequence[Tensor] = matrices.split([experts for experts, _ in runs])
    return parts


def _weigh_exactly(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows by their weights in place, rounding once.

    In half precision the weights are split into two numbers of the rows' type, since products of mixed types are slow.
    """
    weight, coarse = weight[:, None], weight[:, None].to(rows.dtype)
    if rows.itemsize >= weight.itemsize:
        return rows.mul_(coarse)
    return torch.addcmul(rows * (weight - coarse).to(rows.dtype), rows, coarse, out=rows)


def _weigh(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows by their weights in place, in the rows' type, as suits gradients."""
    return rows.mul_(weight[:, None].to(rows.dtype))


def _activate_backward(gradient: Tensor, hidden: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """Return the gradient of the hidden values, and what the activation makes of them."""
    if activation == "swiglu":
        slopes = torch.empty_like(hidden)
        (of_gate, of_lift), (gate, lift) = slopes.chunk(2, dim=-1), hidden.chunk(2, dim=-1)
        activated = F.silu(gate)
        torch.mul(gradient, activated, out=of_lift)
        torch.mul(gradient, lift, out=of_gate)
        torch.ops.aten.silu_backward.grad_input(of_gate, gate, grad_input=of_gate)
        return slopes, activated.mul_(lift)
    if activation == "gelu":
        return torch.ops.aten.gelu_backward(gradient, hidden), F.gelu(hidden)
    return gradient.where(hidden > 0, 0), F.relu(hidden)
