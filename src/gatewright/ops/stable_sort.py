"""A sort that keeps equal values in the order in which they came."""

import torch
from jaxtyping import Int, Num
from torch import Tensor

from gatewright.internals import is_exporting


def stable_sort(
    values: Num[Tensor, "*rows choices"], *, descending: bool = False
) -> tuple[Num[Tensor, "*rows choices"], Int[Tensor, "*rows choices"]]:
    """Sort each row, and return the values and where each was; of equal values the first come first, on every device.

    ONNX has no stable sort. Its exporter turns torch's plain one into ONNX's TopK, which puts the lower index first
    among equal values: https://onnx.ai/onnx/operators/onnx__TopK.html.
    """
    if is_exporting() and torch.onnx.is_in_onnx_export():
        sorted_values, indices = values.sort(dim=-1, descending=descending)
    else:
        sorted_values, indices = values.sort(dim=-1, descending=descending, stable=True)
    return sorted_values, indices


def sort_groups(
    index: Int[Tensor, " assignments"], num_groups: int
) -> tuple[Int[Tensor, " assignments"], Int[Tensor, " assignments"]]:
    """Sort indices from 0 to the number of groups as `stable_sort` does.

    A GPU's radix sort goes through all values once per byte, so there they are sorted as the narrowest integers that
    hold them.
    """
    if index.device.type != "cuda":
        return stable_sort(index)
    narrow = next(kind for kind in (torch.uint8, torch.int16, torch.int32) if num_groups <= torch.iinfo(kind).max)
    sorted_values, indices = stable_sort(index.to(narrow))
    return sorted_values.to(index.dtype), indices
