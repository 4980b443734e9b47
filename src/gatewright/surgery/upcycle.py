"""Sparse upcycling: a dense module becomes a mixture whose experts all begin as its copies."""

import copy
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import nn

from gatewright.dispatch import Dispatcher
from gatewright.experts import ModuleExperts
from gatewright.experts.base import Shape
from gatewright.layers import ExpertLayer, MoE
from gatewright.layers.base import moe_layers
from gatewright.losses import Coefficients
from gatewright.surgery.replace import Match, RouterFactory, replace_modules, two_of_all

Value = TypeVar("Value")


def upcycle(
    model: nn.Module,
    match: Match,
    num_experts: int,
    *,
    router: RouterFactory = two_of_all,
    example: Any = None,
    item_shape: int | Sequence[int] | None = None,
    dispatcher: Dispatcher | None = None,
    losses: Coefficients | None = None,
) -> nn.Module:
    """Replace modules of a dense model by mixtures of their copies: https://arxiv.org/abs/2212.05055.

    In evaluation the model computes what it computed before wherever the weights of an item sum to 1, as the default
    router's do. All copies are equal; they part in training, faster after `add_noise` or `reinitialize`.

    Args:
        model: Any model. It is changed in place, and returned.
        match: The modules to replace: a pattern of their names such as ``"*.mlp"``, or their class.
        num_experts: Number of copies of each.
        router: Function that makes a router from the size of its features and the number of experts.
        example: An input of the model, a tuple or a mapping of several, from which the items of each module are found:
            the fewest trailing dimensions that the module treats alone. Without one, and without `item_shape`, items
            are vectors of the size that the module's first linear layer takes.
        item_shape: Shape of one item; an int stands for one dimension.
        dispatcher: The dispatcher, as in `MoE`.
        losses: Coefficient per auxiliary loss, as in `MoE`. Training adds `gatewright.aux_loss(model)`.

    Raises:
        ValueError: If no module matches, or one does not treat its items alone; the model is as it was.
    """

    def make(module: nn.Module, item: Shape) -> MoE:
        experts = ModuleExperts(lambda: copy.deepcopy(module), num_experts)
        return mixture_of(experts, item, router, dispatcher, losses)

    return replace_modules(model, match, make, example=example, item_shape=item_shape)


def mixture_of(
    experts: ModuleExperts,
    item: Shape,
    router: RouterFactory,
    dispatcher: Dispatcher | None,
    losses: Coefficients | None,
) -> MoE:
    """Make the mixture of some experts, with a router that looks at whole items."""
    gate = router(math.prod(item), experts.num_experts)
    return MoE(gate, experts, item_shape=item, dispatcher=dispatcher, losses=losses)


def upcycled_state(dense: Mapping[str, Value], model: nn.Module) -> dict[str, Value]:
    """Name the state of a dense model as the model has it in which mixtures of copies took the place of modules.

    Args:
        dense: The state by name: parameters and buffers as ``state_dict`` names them, or what belongs to a parameter,
            under its name with an ending of its own.
        model: The model with mixtures (of `ModuleExperts`) where the dense one has the modules.

    Returns:
        What belongs to a module, once for each of its copies; everything else as it is. Routers are not in it.
    """
    mixtures = {
        f"{name}.": layer.experts.num_experts
        for name, layer in moe_layers(model)
        if isinstance(layer, ExpertLayer) and isinstance(layer.experts, ModuleExperts)
    }
    state: dict[str, Value] = {}
    for name, value in dense.items():
        prefix = next((prefix for prefix in mixtures if name.startswith(prefix)), None)
        if prefix is None:
            state[name] = value
        else:
            rest = name.removeprefix(prefix)
            state |= {f"{prefix}experts.experts.{expert}.{rest}": value for expert in range(mixtures[prefix])}
    return state
