"""What the Triton kernels compute, in plain torch: the back-end `torch`, on any device."""

from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

Activation = Literal["gelu", "relu", "swiglu"]


def activate(hidden: Float[Tensor, "assignments hidden"], activation: str) -> Float[Tensor, "assignments ffn"]:
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
    save: bool,
) -> tuple[Float[Tensor, "saved hidden"], Float[Tensor, "assignments ffn"]]:
    """Return ``hidden = x[token] W_in``, if it is to be saved, and ``weight * activation(hidden)``."""
    hidden = grouped(x.index_select(0, token_index), weight_in, ends)
    return hidden if save else hidden[:0].clone(), _weigh(activate(hidden, activation), weight)


def grouped(
    rows: Float[Tensor, "assignments inner"],
    matrices: Float[Tensor, "experts inner out"],
    ends: Int[Tensor, " experts"],
) -> Float[Tensor, "assignments out"]:
    """Multiply the rows of each expert by its matrix; every row is some expert's."""
    if _torch_takes(rows, *matrices.shape[1:]):
        return F.grouped_mm(rows, matrices, offs=ends)
    groups = zip(_groups(rows, ends), matrices.unbind(), strict=True)
    return torch.cat([group @ matrix for group, matrix in groups])


def gather_sum(
    rows: Float[Tensor, "assignments dim"], row_index: Int[Tensor, "top_k tokens"]
) -> Float[Tensor, "tokens dim"]:
    """Add up each token's rows in at least float32."""
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
    activated = activate(hidden, activation)
    weight_gradient = (slope * activated).sum(-1, dtype=weight.dtype)
    return _activate_backward(_weigh(slope, weight), hidden, activation), _weigh(activated, weight), weight_gradient


def weight_gradient(
    left: Float[Tensor, "left_rows height"],
    right: Float[Tensor, "right_rows width"],
    token_index: Int[Tensor, " assignments"],
    ends: Int[Tensor, " experts"],
    gathered: str,
) -> Float[Tensor, "experts height width"]:
    """Sum the outer products of each expert's rows; one side, named by `gathered`, is in the order of tokens."""
    if gathered == "left":
        left = left.index_select(0, token_index)
    else:
        right = right.index_select(0, token_index)
    if _torch_takes(left, left.shape[1], right.shape[1]):
        return F.grouped_mm(left.t(), right, offs=ends)
    groups = zip(_groups(left, ends), _groups(right, ends), strict=True)
    return torch.stack([one.t() @ other for one, other in groups])


def _torch_takes(rows: Tensor, *sizes: int) -> bool:
    """Torch's grouped GEMM wants rows of 16 bytes, and some; float32 only on CPU."""
    dtypes = (torch.bfloat16, torch.float32) if rows.device.type == "cpu" else (torch.bfloat16,)
    aligned = all(size * rows.element_size() % 16 == 0 for size in sizes)
    return rows.dtype in dtypes and aligned and rows.shape[0] > 0


def _groups(rows: Tensor, ends: Tensor) -> list[Tensor]:
    return [rows[start:end] for start, end in pairwise([0, *ends.tolist()])]


def _weigh(rows: Tensor, weight: Tensor) -> Tensor:
    """Multiply rows by their weights, rounding once and without a wider copy."""
    return torch.mul(rows, weight[:, None], out=torch.empty_like(rows))


def _activate_backward(gradient: Tensor, hidden: Tensor, activation: str) -> Tensor:
    if activation == "swiglu":
        gate, lift = hidden.chunk(2, dim=-1)
        of_gate = torch.ops.aten.silu_backward(gradient * lift, gate)
        return torch.cat([of_gate, gradient * F.silu(gate)], -1)
    if activation == "gelu":
        slope: Tensor = torch.ops.aten.gelu_backward(gradient, hidden)
        return slope
    return gradient.where(hidden > 0, 0)
