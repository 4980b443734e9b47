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
