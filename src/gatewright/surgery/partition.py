"""Partition: the hidden units of a dense feed-forward block are dealt out to the experts, each unit to one."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from gatewright.dispatch import Dispatcher
from gatewright.experts import ModuleExperts
from gatewright.experts.base import Shape
from gatewright.layers.moe import MoE
from gatewright.losses import Coefficients
from gatewright.surgery.feed_forward import hidden_units_of
from gatewright.surgery.replace import Match, RouterFactory, replace_modules, two_of_all
from gatewright.surgery.upcycle import mixture_of


def partition(
    model: nn.Module,
    match: Match,
    num_experts: int,
    *,
    router: RouterFactory = two_of_all,
    example: Any = None,
    item_shape: int | Sequence[int] | None = None,
    dispatcher: Dispatcher | None = None,
    losses: Coefficients | None = None,
    generator: torch.Generator | None = None,
) -> nn.Module:
    """Replace feed-forward blocks of a dense model by mixtures of their parts, with no more parameters than before.

    Every expert gets an equal number of hidden units, drawn at random (https://arxiv.org/abs/2406.16554), and its
    output is that of its units times the number of experts. With equal weights that sum to 1 the mean over all experts
    is therefore the output of the dense block, and a few experts estimate it without bias.

    Args:
        model: Any model. It is changed in place, and returned.
        match: The modules to replace, as in `upcycle`; they are feed-forward blocks.
        num_experts: Number of parts of each; it divides the number of hidden units.
        router: Function that makes a router from the size of its features and the number of experts.
        example: An input of the model, as in `upcycle`.
        item_shape: Shape of one item, as in `upcycle`.
        dispatcher: The dispatcher, as in `MoE`.
        losses: Coefficient per auxiliary loss, as in `MoE`.
        generator: Generator that the units are drawn from; by default torch's own.

    Raises:
        ValueError: If a module is not a feed-forward block, or its hidden units do not come out even; the model is as
            it was.
    """

    def make(module: nn.Module, item: Shape) -> MoE:
        experts = ModuleExperts(_parts(module, num_experts, generator))
        return mixture_of(experts, item, router, dispatcher, losses)

    return replace_modules(model, match, make, example=example, item_shape=item_shape)


@torch.no_grad()
def _parts(module: nn.Module, num_experts: int, generator: torch.Generator | None) -> list[nn.Module]:
    number = hidden_units_of(module).number
    if num_experts < 1 or number % num_experts:
        raise ValueError(
            f"Every expert gets equally many hidden units; got {number} hidden units and {num_experts} experts. Choose "
            "a number of experts that divides them."
        )
    parts = [copy.deepcopy(module) for _ in range(num_experts)]
    for part, own in zip(parts, torch.randperm(number, generator=generator).chunk(num_experts), strict=True):
        units = hidden_units_of(part)
        units.keep(own)
        units.after.weight *= num_experts  # The bias is in every part, and so in the mean.
    return parts
