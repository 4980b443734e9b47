"""The fused feed-forward: from tokens to their weighted sums, without keeping a row per assignment.

Saved for backward are the items, the hidden values before the activation, and the order of the assignments. What else
backward needs is gathered or computed again, as in SonicMoE: https://arxiv.org/abs/2512.14080.
"""

import math
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatewright.kernels.plain import activate
from gatewright.ops.grouped_mm import grouped_mm
from gatewright.ops.memory import GradientMemory
from gatewright.ops.registry import BACKENDS, Kernels, choose_backend

BLOCK_BYTES = 8 * 2**20
"""Bytes of hidden values that a CPU computes at a time, as far as whole experts allow."""


def routed_feed_forward(
    x: Float[Tensor, "tokens dim"],
    weight_in: Float[Tensor, "experts dim hidden"],
    weight_out: Float[Tensor, "experts ffn dim"],
    weight: Float[Tensor, " assignments"],
    token_index: Int[Tensor, " assignments"],
    row_index: Int[Tensor, "top_k tokens"],
    tokens_per_expert: Int[Tensor, " experts"],
    activation: str,
    backend: str | None = None,
    memory: GradientMemory | None = None,
) -> Float[Tensor, "tokens dim"]:
    """``y = sum_i weight_i activation(x W_in,i) W_out,i`` over each token's experts.

    Args:
        x: Items.
        weight_in: First matrices, of the items' type. Transposed views are as good: their gradients have their strides.
        weight_out: Second matrices, likewise.
        weight: The weight of each assignment, sorted by expert.
        token_index: The token of each assignment, sorted by expert.
        row_index: The places of each token's assignments in this order.
        tokens_per_expert: Number of assignments of each expert; none is dropped. Some may be padding.
        activation: ``"gelu"``, ``"relu"`` or ``"swiglu"``.
        backend: Name in `BACKENDS`; None takes the first that can.
        memory: Where the gradients of both matrices go, if the memory of the last ones is to be used again.

    Raises:
        ValueError: If the back-end given does not take the items.
    """
    backend = choose_backend(x, backend)
    ends = tokens_per_expert.cumsum(0, dtype=torch.int32)
    matrices = (_dense(matrix, BACKENDS[backend].transposed) for matrix in (weight_in, weight_out))
    parts = (x.contiguous(), *matrices, weight.contiguous())
    save = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    run: Callable[..., Any] = (
        _forward if torch.compiler.is_compiling() else partial(_Routed.apply, memory or GradientMemory())
    )
    output: Tensor = run(*parts, token_index, row_index, ends, activation, backend, save)[0]
    return output


def _dense(matrices: Tensor, transposed: bool) -> Tensor:
    """Copy matrices that are neither contiguous nor, where the back-end takes those, transposed views of such."""
    return matrices if transposed and matrices.mT.is_contiguous() else matrices.contiguous()


def specification(
    x: Tensor, weight_in: Tensor, weight_out: Tensor, weight: Tensor, token_index: Tensor, ends: Tensor, activation: str
) -> Tensor:
    """Compute the same in plain steps, which have derivatives of any order."""
    counts = ends.diff(prepend=ends.new_zeros(1))
    hidden = grouped_mm(x.index_select(0, token_index), weight_in, counts)
    rows = grouped_mm(activate(hidden, activation), weight_out, counts) * weight[:, None]
    return rows.new_zeros(x.shape[0], rows.shape[1]).index_add(0, token_index, rows).to(x.dtype)


def _run_forward(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    weight: Tensor,
    token_index: Tensor,
    row_index: Tensor,
    ends: Tensor,
    activation: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    kernels, num_rows = BACKENDS[backend].kernels(), token_index.shape[0]
    hidden, rows = x.new_empty(num_rows if save else 0, weight_in.shape[2]), x.new_empty(num_rows, weight_out.shape[2])
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        for own, place, stops in _blocks(ends, hidden):
            saved = hidden[place] if save else None
            activated = kernels.up(x, weight_in[own], weight[place], token_index[place], stops, activation, saved)
            kernels.grouped(activated, weight_out[own], stops, rows[place])
        return kernels.gather_sum(rows, row_index), hidden


def _run_backward(
    gradient: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    weight: Tensor,
    token_index: Tensor,
    row_index: Tensor,
    ends: Tensor,
    hidden: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_into(
        torch.empty_like(weight_in), torch.empty_like(weight_out), gradient, x, weight_in, weight_out, weight,
        token_index, row_index, ends, hidden, activation, backend,
    )  # fmt: skip


def _backward_into(
    of_in: Tensor,
    of_out: Tensor,
    gradient: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    weight: Tensor,
    token_index: Tensor,
    row_index: Tensor,
    ends: Tensor,
    hidden: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = BACKENDS[backend].kernels()
    rows, of_weight = x.new_empty(token_index.shape[0], x.shape[1]), torch.empty_like(weight)
    with torch.autocast(x.device.type, enabled=False), torch.cuda.device_of(x):
        for own, place, stops in _blocks(ends, hidden):
            token = token_index[place]
            of_hidden, activated, of_weight[place] = kernels.down_backward(
                gradient, weight_out[own], hidden[place], weight[place], token, stops, activation
            )
            _weight_gradient(kernels, of_out[own], activated, gradient, token, stops, "right")
            _weight_gradient(kernels, of_in[own], x, of_hidden, token, stops, "left")
            kernels.grouped(of_hidden, weight_in[own].transpose(1, 2), stops, rows[place])
        return kernels.gather_sum(rows, row_index), of_in, of_out, of_weight


def _blocks(ends: Tensor, hidden: Tensor) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yield experts, their rows, and where the rows of each end, as many as stay in a processor's cache together.

    What lies between two products is then read from the cache, and is small enough for the C library to keep its memory
    from step to step. Other devices take all experts at once.
    """
    if hidden.device.type != "cpu":
        yield slice(None), slice(None), ends
        return
    most = BLOCK_BYTES // (hidden.shape[1] * hidden.itemsize)
    first = start = 0
    bounds = ends.tolist()
    for expert, end in enumerate(bounds):
        following = bounds[expert + 1] if expert + 1 < len(bounds) else math.inf
        if following - start > most:
            yield slice(first, expert + 1), slice(start, end), ends[first : expert + 1] - start
            first, start = expert + 1, end


def _weight_gradient(
    kernels: Kernels, out: Tensor, left: Tensor, right: Tensor, token_index: Tensor, ends: Tensor, gathered: str
) -> None:
    """Write the gradient of matrices, which has their strides, so that autograd accumulates it without a copy."""
    if out.is_contiguous():
        kernels.weight_gradient(left, right, token_index, ends, gathered, out)
    else:
        other = "left" if gathered == "right" else "right"
        kernels.weight_gradient(right, left, token_index, ends, other, out.mT)


# Operators, so that torch.compile sees them whole; without it their wrappers would cost more than small products do.
_forward = torch.library.custom_op("gatewright::routed_feed_forward", _run_forward, mutates_args=())
_gradients = torch.library.custom_op("gatewright::routed_feed_forward_backward", _run_backward, mutates_args=())


@_forward.register_fake
def _(
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    weight: Tensor,
    token_index: Tensor,
    row_index: Tensor,
    ends: Tensor,
    activation: str,
    backend: str,
    save: bool,
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(x), x.new_empty(token_index.shape[0] if save else 0, weight_in.shape[2])


@_gradients.register_fake
def _(
    gradient: Tensor,
    x: Tensor,
    weight_in: Tensor,
    weight_out: Tensor,
    weight: Tensor,
    token_index: Tensor,
    row_index: Tensor,
    ends: Tensor,
    hidden: Tensor,
    activation: str,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(weight_in), torch.empty_like(weight_out), torch.empty_like(weight)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:7], output[1])
    ctx.activation, ctx.backend = inputs[7:9]


def _operator_backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 10
    found = _gradients(gradient.contiguous(), *ctx.saved_tensors, ctx.activation, ctx.backend)
    return (*found, *[None] * 6)


def _differentiable_gradients(ctx: Any, gradient: Tensor, inputs: list[Tensor]) -> list[Tensor | None]:
    *parts, token_index, _, ends = inputs
    parts = [part.view_as(part) for part in parts]  # No gradient arrives at the leaves here, whose hooks would take it.
    wanted = [part for part, needed in zip(parts, ctx.needs_input_grad[1:5], strict=True) if needed]
    x, weight_in, weight_out, weight = parts
    output = specification(x, weight_in, weight_out, weight, token_index, ends, ctx.activation)
    found = iter(torch.autograd.grad(output, wanted, gradient, create_graph=True))
    return [next(found) if needed else None for needed in ctx.needs_input_grad[1:5]]


_forward.register_autograd(_operator_backward, setup_context=_save)


class _Routed(torch.autograd.Function):
    """The same without an operator's wrappers, with the memory of its last gradients.

    It has no `setup_context`, for which torch would look at the signature in every call.
    """

    @staticmethod
    def forward(ctx: Any, memory: GradientMemory, *inputs: Any) -> tuple[Tensor, Tensor]:
        output = _run_forward(*inputs)
        ctx.memory = memory
        _save(ctx, inputs, output)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
        if gradient is None:  # Nothing that is asked for depends on the output.
            return (None,) * 11
        *inputs, hidden = ctx.saved_tensors
        if torch.is_grad_enabled():  # A derivative of this one may be asked for.
            return (None, *_differentiable_gradients(ctx, gradient, inputs), *[None] * 6)
        into = (ctx.memory.empty_like("in", inputs[1]), ctx.memory.empty_like("out", inputs[2]))
        run: Callable[..., Any] = _backward_into
        found = run(*into, gradient.contiguous(), *inputs, hidden, ctx.activation, ctx.backend)
        return (None, *found, *[None] * 6)
