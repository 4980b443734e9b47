"""Layers in plain loops: what a mixture of experts computes. Read this first."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn


def mixture(
    x: Float[Tensor, "tokens *item"],
    gates: Float[Tensor, "tokens experts"],
    experts: Sequence[nn.Module],
    shared: nn.Module | None = None,
) -> Float[Tensor, "tokens *out"]:
    """``y = sum_i G(x)_i E_i(x)``, calling an expert for the tokens whose gate is not 0.

    https://arxiv.org/abs/1701.06538 eq. 1. An expert sees its tokens as one batch, because BatchNorm makes that matter.
    A token without an expert gets zero. A shared expert is added for every token:
    https://arxiv.org/abs/2401.06066 section 3.2.
    """
    outputs = [x.new_zeros(())] * len(x)
    for index, expert in enumerate(experts):
        tokens = [token for token in range(len(x)) if gates[token, index] != 0]
        if tokens:
            for token, row in zip(tokens, expert(x[tokens]), strict=True):
                outputs[token] = outputs[token] + gates[token, index] * row
    mixed = torch.stack(torch.broadcast_tensors(*outputs))
    return mixed if shared is None else mixed + shared(x)


def of_real_items(
    layer: Callable[[Tensor], Tensor], x: Float[Tensor, "tokens *item"], mask: Bool[Tensor, " tokens"]
) -> Float[Tensor, "tokens *out"]:
    """What a layer makes of the items where the mask is True, as if there were no others, and zeros elsewhere."""
    outputs = layer(x[mask])
    rows = iter(outputs)
    return torch.stack([next(rows) if real else torch.zeros_like(outputs[0]) for real in mask.tolist()])


def merged(
    x: Float[Tensor, "tokens *item"], gates: Float[Tensor, "tokens experts"], experts: Sequence[nn.Module]
) -> Float[Tensor, "tokens *out"]:
    """``y = f(x; sum_i G(x)_i theta_i)``, one token at a time: https://arxiv.org/abs/1904.04971 section 3."""
    parameters = [dict(expert.named_parameters()) for expert in experts]
    outputs = []
    for item, row in zip(x, gates, strict=True):
        mixed = {name: sum(row[i] * parameters[i][name] for i in range(len(experts))) for name in parameters[0]}
        outputs.append(torch.func.functional_call(experts[0], mixed, (item[None],))[0])
    return torch.stack(outputs)


def residual(
    x: Float[Tensor, "tokens *item"],
    mixed: Float[Tensor, "tokens *out"],
    kept: Float[Tensor, "tokens *out"],
    coefficient: nn.Linear,
) -> Float[Tensor, "tokens *out"]:
    """``y = c_0 mixed + c_1 kept`` with ``c = softmax(W x + b)``: https://arxiv.org/abs/2201.05596 section 4.1."""
    outputs = []
    for item, of_mixture, of_branch in zip(x, mixed, kept, strict=True):
        first, second = (coefficient.weight @ item.flatten() + coefficient.bias).exp()
        outputs.append((first * of_mixture + second * of_branch) / (first + second))
    return torch.stack(outputs)


def soft_mixture(
    x: Float[Tensor, "tokens *item"],
    dispatch: Float[Tensor, "tokens slots"],
    combine: Float[Tensor, "tokens slots"],
    experts: Sequence[nn.Module],
    group_size: int,
) -> Float[Tensor, "tokens *out"]:
    """``Y = C f(D^T X)`` in each group, calling an expert once for its slots of all groups.

    https://arxiv.org/abs/2308.00951 section 2.1; the first slots are the first expert's.
    """
    groups = [range(first, first + group_size) for first in range(0, len(x), group_size)]
    per_expert = dispatch.shape[1] // len(experts)
    outputs = [x.new_zeros(())] * len(x)
    for index, expert in enumerate(experts):
        places = [(group, index * per_expert + slot) for group in groups for slot in range(per_expert)]
        rows = torch.stack([sum((dispatch[i, slot] * x[i] for i in group), x.new_zeros(())) for group, slot in places])
        for (group, slot), row in zip(places, expert(rows), strict=True):
            for token in group:
                outputs[token] = outputs[token] + combine[token, slot] * row
    return torch.stack(outputs)
