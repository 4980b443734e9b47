"""Grouped GEMM: one matrix product per expert over rows grouped by expert."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from gatewright.internals import in_forward_mode, in_transform, is_batched, is_exporting


def grouped_mm(
    rows: Float[Tensor, "assignments dim"],
    weight: Float[Tensor, "experts dim out"],
    tokens_per_expert: Int[Tensor, " experts"],
) -> Float[Tensor, "assignments out"]:
    """Multiply each group of rows by its expert's matrix. Rows past the last group give zeros, and get zero gradient.

    An empty group's matrix gets a gradient of zeros. The back-ends compute the same: torch's own grouped GEMM where it
    takes the input, else a loop of plain products, which has derivatives of any order and in forward mode. Where the
    lengths of groups cannot be read, under `torch.func.vmap` and in an exported program that torch's own GEMM does not
    serve, every matrix is multiplied by every row.
    """
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    if is_batched(ends):
        return _every_product(rows, weight, ends)
    if _torch_takes(rows, weight):
        # Torch leaves rows past the last group uninitialised, in the output and in the gradient.
        in_group = (torch.arange(rows.shape[0], device=rows.device) < ends[-1])[:, None]
        return F.grouped_mm(rows.where(in_group, 0), weight, offs=ends).where(in_group, 0)
    if is_exporting():
        return _every_product(rows, weight, ends)
    loop = _compiled_loop if torch.compiler.is_compiling() else _loop
    product: Tensor = loop(rows, weight, ends)
    return product


def expert_of_rows(ends: Int[Tensor, " experts"], num_rows: int) -> Int[Tensor, " rows"]:
    """Return the expert of each row, from the ends of the groups; rows past the last group have ``num_experts``."""
    place = torch.arange(num_rows, device=ends.device, dtype=ends.dtype)
    if is_exporting() or is_batched(ends):  # ONNX and vmap have no searchsorted.
        return (place[:, None] >= ends).sum(-1)
    return torch.searchsorted(ends, place, right=True)


def _torch_takes(rows: Tensor, weight: Tensor) -> bool:
    """Torch's grouped GEMM wants rows of 16 bytes; float32 only on CPU, and there not compiled or exported."""
    if in_transform() or in_forward_mode() or torch.onnx.is_in_onnx_export():
        return False
    float32_works = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    dtypes = (torch.bfloat16, torch.float32) if float32_works else (torch.bfloat16,)
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    return rows.dtype in dtypes and aligned and (is_exporting() or rows.shape[0] > 0)


def _loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    lengths = ends.diff(prepend=ends.new_zeros(1)).tolist()
    *groups, dropped = rows.split([*lengths, rows.shape[0] - sum(lengths)])
    products = [group @ matrix for group, matrix in zip(groups, weight.unbind(), strict=True)]
    return torch.cat([*products, dropped.new_zeros(dropped.shape[0], weight.shape[2])])


def _every_product(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    expert = expert_of_rows(ends, rows.shape[0])[:, None]
    product = rows.new_zeros(rows.shape[0], weight.shape[2])
    for index, matrix in enumerate(weight.unbind()):
        product = torch.where(expert == index, rows @ matrix, product)
    return product


# An operator of its own, because torch.compile cannot trace a loop whose lengths depend on the data.
@torch.library.custom_op("gatewright::grouped_mm_loop", mutates_args=())
def _compiled_loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    product = rows.new_zeros(rows.shape[0], weight.shape[2])
    for matrix, group in zip(weight, _groups(ends), strict=True):
        product[group] = rows[group] @ matrix
    return product


@torch.library.custom_op("gatewright::grouped_mm_loop_backward", mutates_args=())
def _compiled_backward(gradient: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    rows_gradient, weight_gradient = torch.zeros_like(rows), torch.zeros_like(weight)
    for index, group in enumerate(_groups(ends)):
        rows_gradient[group] = gradient[group] @ weight[index].t()
        weight_gradient[index] = rows[group].t() @ gradient[group]
    return rows_gradient, weight_gradient


def _groups(ends: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *ends.tolist()])]


@_compiled_loop.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_compiled_backward.register_fake
def _(gradient: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows_gradient, weight_gradient = _compiled_backward(gradient, *ctx.saved_tensors)
    return rows_gradient, weight_gradient, None


_compiled_loop.register_autograd(_backward, setup_context=_save)
