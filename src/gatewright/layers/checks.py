"""What a layer takes: a router of its kind, experts that fit it, items behind any batch dimensions, and a mask."""

import torch
from torch import Tensor, nn

from gatewright.experts.base import Experts, Shape, check_experts, check_output_shape

TRACED = (
    "torch.jit.trace would keep the routes of its example for ever, and give other inputs wrong outputs. Use "
    "torch.export.export, or torch.onnx.export(..., dynamo=True)."
)
NO_WEIGHT = (
    "{name} has no {attribute}: every expert has its own. If torch.nn.TransformerEncoderLayer asks, whose fast path "
    "reads it in evaluation, call torch.backends.mha.set_fastpath_enabled(False) first."
)


def check_items(x: Tensor, mask: Tensor | None, item_shape: Shape, layer: str) -> None:
    """Refuse an input that a layer cannot take.

    Raises:
        ValueError: If these are not floating-point items of the shape, or the mask is not theirs.
        RuntimeError: If the layer is traced by `torch.jit.trace`.
    """
    if torch.jit.is_tracing():  # type: ignore[attr-defined, no-untyped-call]
        raise RuntimeError(TRACED)
    if not x.is_floating_point():
        raise ValueError(f"{layer} takes floating-point items; got {x.dtype}. Convert with x.float() first.")
    batch, item = x.shape[: x.dim() - len(item_shape)], x.shape[x.dim() - len(item_shape) :]
    if x.dim() <= len(item_shape) or tuple(item) != item_shape:
        raise ValueError(
            f"{layer} takes items of shape {item_shape} behind one or more batch dimensions; got {tuple(x.shape)}. "
            "Reshape the input, or set item_shape."
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != batch):
        raise ValueError(
            f"A mask is a bool tensor of the batch dimensions, {tuple(batch)}, and True where an item is real; got "
            f"{mask.dtype} of shape {tuple(mask.shape)}. Torch's key_padding_mask is True where an item is not: pass "
            "mask=~key_padding_mask."
        )


def check_router(router: object, kind: type[nn.Module], layer: str) -> None:
    """Refuse a router that is not of a layer's kind.

    Raises:
        ValueError: The sentence says which layer takes which.
    """
    if not isinstance(router, kind):
        raise ValueError(
            f"{layer} takes a gatewright.{kind.__name__} for its router; got {type(router).__name__}. SoftMoE takes "
            "gatewright.Soft(dim, num_experts), which mixes items into slots, and other layers a router that chooses "
            "experts, such as gatewright.TopK(dim, num_experts, top_k=2), which has a linear layer of its own."
        )


def check_num_experts(router_has: int, num_experts: int) -> None:
    """Refuse experts that are not as many as the router chooses among.

    Raises:
        ValueError: The sentence has both numbers.
    """
    if router_has != num_experts:
        raise ValueError(
            f"The router chooses among {router_has} experts and there are {num_experts}. "
            "Give both the same num_experts."
        )


def fitting_output_shape(router_has: int, item_shape: Shape, experts: Experts, shared: nn.Module | None) -> Shape:
    """Return the shape of an output of experts, and of the shared one, that fit a layer.

    Raises:
        ValueError: If the experts are none, are not as many as the router chooses among, do not take the items or
            return different shapes, or if the shared expert does not fit them.
    """
    check_experts(experts)
    check_num_experts(router_has, experts.num_experts)
    output_shape = experts.output_shape(item_shape)
    if shared is not None:
        check_output_shape("the shared expert", shared, item_shape, output_shape)
    return output_shape
