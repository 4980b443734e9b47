"""Grouped GEMM: one matrix product per expert over rows grouped by expert."""

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor


def grouped_mm(
    rows: Float[Tensor, "assignments dim"],
    weight: Float[Tensor, "experts dim out"],
    tokens_per_expert: Int[Tensor, " experts"],
) -> Float[Tensor, "assignments out"]:
    """Multiply each group of rows by its expert's matrix. Rows past the last group give zeros, and get zero gradient.

    Torch's own grouped GEMM where it takes the input, else a loop of plain products. An empty group's matrix gets a
    gradient of zeros.
    """
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    if not _torch_takes(rows, weight):
        product: Tensor = _grouped_mm_loop(rows, weight, ends)
        return product
    # Torch leaves rows past the last group uninitialised, in the output and in the gradient.
    in_group = (torch.arange(len(rows), device=rows.device) < ends[-1])[:, None]
    return F.grouped_mm(rows.where(in_group, 0), weight, offs=ends).where(in_group, 0)


def _torch_takes(rows: Tensor, weight: Tensor) -> bool:
    """Torch's grouped GEMM wants rows of 16 bytes; float32 only on CPU, and there not under torch.compile."""
    float32_works = rows.device.type == "cpu" and not torch.compiler.is_compiling()
    dtypes = (torch.bfloat16, torch.float32) if float32_works else (torch.bfloat16,)
    aligned = all(size * rows.element_size() % 16 == 0 for size in weight.shape[1:])
    return rows.dtype in dtypes and aligned and len(rows) > 0


# An operator of its own, because torch.compile cannot trace a loop whose lengths depend on the data.
@torch.library.custom_op("gatewright::grouped_mm_loop", mutates_args=())
def _grouped_mm_loop(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    product = rows.new_zeros(len(rows), weight.shape[2])
    for matrix, group in zip(weight, _groups(ends), strict=True):
        product[group] = rows[group] @ matrix
    return product


@torch.library.custom_op("gatewright::grouped_mm_loop_backward", mutates_args=())
def _grouped_mm_loop_backward(gradient: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    rows_gradient, weight_gradient = torch.zeros_like(rows), torch.zeros_like(weight)
    for index, group in enumerate(_groups(ends)):
        rows_gradient[group] = gradient[group] @ weight[index].t()
        weight_gradient[index] = rows[group].t() @ gradient[group]
    return rows_gradient, weight_gradient


def _groups(ends: Tensor) -> list[slice]:
    return [slice(start, end) for start, end in pairwise([0, *ends.tolist()])]


@_grouped_mm_loop.register_fake
def _(rows: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


@_grouped_mm_loop_backward.register_fake
def _(gradient: Tensor, rows: Tensor, weight: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(rows), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None]:
    rows_gradient, weight_gradient = _grouped_mm_loop_backward(gradient, *ctx.saved_tensors)
    return rows_gradient, weight_gradient, None


_grouped_mm_loop.register_autograd(_backward, setup_context=_save)
