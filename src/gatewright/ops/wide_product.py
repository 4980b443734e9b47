"""The product of a gate in bfloat16, with its sums in float32 as they are."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.internals import in_forward_mode, in_transform, is_exporting


def wide_product(
    x: Float[Tensor, "tokens inputs"], weight: Float[Tensor, "outputs inputs"]
) -> Float[Tensor, "tokens outputs"] | None:
    """Return ``x weight^T`` in float32 without converting either first; None where torch has no such product.

    The products of bfloat16 are exact in float32, so nothing is lost. Gradients are products in bfloat16, as their
    results are.
    """
    of_type = x.dtype == weight.dtype == torch.bfloat16 and x.device.type == "cuda"
    special = torch.compiler.is_compiling() or is_exporting() or in_transform() or in_forward_mode()
    if not of_type or special or x.dim() != 2:
        return None
    product: Tensor = _WideProduct.apply(x, weight)  # type: ignore[no-untyped-call]  # pragma: no cover as below
    return product  # pragma: no cover as below


class _WideProduct(torch.autograd.Function):  # pragma: no cover because it needs a CUDA device: see tests/gpu
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return torch.mm(x, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        gradient = gradient.to(x.dtype)
        of_x, of_weight = ctx.needs_input_grad
        return gradient @ weight if of_x else None, gradient.t() @ x if of_weight else None
