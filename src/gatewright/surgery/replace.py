"""Which modules of a model are replaced, what their items are, and the replacement itself."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from gatewright.experts.base import Shape
from gatewright.layers.moe import MoE
from gatewright.routers import Router, TopK

Match = str | type[nn.Module] | tuple[type[nn.Module], ...]
"""A pattern of names such as ``"*.mlp"``, in which ``*`` stands for anything, or a class or several."""

RouterFactory = Callable[[int, int], Router]
"""Makes a router from the size of its features and the number of experts."""

two_of_all: RouterFactory = partial(TopK, top_k=2, score_after_top_k=True)
"""The default router: the best two experts, with weights that sum to 1."""


def matching_modules(model: nn.Module, match: Match) -> dict[str, nn.Module]:
    """Return the modules that match, by name; not those inside another one that matches.

    Raises:
        ValueError: If there is none, or it is the model itself, which nothing holds.
    """
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        matches = fnmatchcase(name, match) if isinstance(match, str) else isinstance(module, match)
        if matches and not any(name.startswith(f"{outer}.") for outer in found):
            if not name:
                raise ValueError(
                    f"A module is replaced inside the model that holds it; {match!r} matches the model itself. Pass a "
                    "model around it, such as nn.Sequential(module)."
                )
            found[name] = module
    if not found:
        named = ", ".join(f"{name} ({type(child).__name__})" for name, child in model.named_modules() if name)
        raise ValueError(f"No module matches {match!r}. Choose among: {named or 'none, the model has no sub-modules'}.")
    return found


def item_shapes(
    model: nn.Module, modules: Mapping[str, nn.Module], example: Any, given: int | Sequence[int] | None
) -> dict[str, Shape]:
    """Return the shape of one item of each module: as given, as an example shows, or as the first linear layer says.

    Raises:
        ValueError: If neither says what an item is.
    """
    if given is not None:
        return dict.fromkeys(modules, (given,) if isinstance(given, int) else tuple(given))
    if example is None:
        return {name: _shape_of_vectors(name, module) for name, module in modules.items()}
    calls = _calls(model, modules, example)
    return {name: _smallest_item(name, modules[name], *calls[name]) for name in modules}


def replace_modules(
    model: nn.Module,
    match: Match,
    make: Callable[[nn.Module, Shape], MoE],
    *,
    example: Any,
    item_shape: int | Sequence[int] | None,
) -> nn.Module:
    """Put a mixture in place of every module that matches; one that is used under several names stays one."""
    modules = matching_modules(model, match)
    shapes = item_shapes(model, modules, example, item_shape)
    made: dict[nn.Module, MoE] = {}  # Nothing is replaced before everything is made.
    for name, module in modules.items():
        if module not in made:
            made[module] = _like(make(module, shapes[name]), module)
    for name, module in modules.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, made[module])
    return model


def _like(mixture: MoE, module: nn.Module) -> MoE:
    """Put the router where the module is, and the mixture into its mode."""
    like = next((parameter for parameter in module.parameters() if parameter.is_floating_point()), None)
    if like is not None:
        mixture.router.to(like.device, like.dtype)
    return mixture.train(module.training)


def _shape_of_vectors(name: str, module: nn.Module) -> Shape:
    first = next((part for part in module.modules() if isinstance(part, nn.Linear | nn.Conv1d | nn.Conv2d)), None)
    if not isinstance(first, nn.Linear):
        raise ValueError(
            f"An item is what one expert takes at a time, and its shape shows where a module begins with a linear "
            f"layer; {name} is a {type(module).__name__}. Pass example, an input of the model, or item_shape."
        )
    return (first.in_features,)


@torch.no_grad()
def _calls(
    model: nn.Module, modules: Mapping[str, nn.Module], example: Any
) -> dict[str, tuple[tuple[Any, ...], Tensor]]:
    """Run a model in evaluation mode, and return the inputs and the output of each module."""
    calls: dict[nn.Module, tuple[tuple[Any, ...], Tensor]] = {}
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: calls.update({module: (inputs, output)}))
        for module in set(modules.values())
    ]
    try:
        evaluate(model, [example])
    finally:
        for hook in hooks:
            hook.remove()
    if missing := [name for name, module in modules.items() if module not in calls]:
        raise ValueError(f"The example did not run {', '.join(missing)}. Pass one that does, or item_shape.")
    return {name: calls[module] for name, module in modules.items()}


@torch.no_grad()
def evaluate(model: nn.Module, inputs: Iterable[Any]) -> None:
    """Run a model in evaluation mode on inputs, a tensor or several of them each, and leave every mode as it was."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        for each in inputs:
            _call(model, each)
    finally:
        for module, training in modes:
            module.training = training


def _call(model: nn.Module, example: Any) -> None:
    if isinstance(example, Mapping):
        model(**example)
    elif isinstance(example, tuple):
        model(*example)
    else:
        model(example)


@torch.no_grad()
def _smallest_item(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Shape:
    """Find the fewest trailing dimensions such that a module treats all that is in front of them as a batch."""
    if len(inputs) != 1 or not isinstance(inputs[0], Tensor) or not isinstance(output, Tensor):
        raise ValueError(
            f"A mixture takes one tensor and returns one; {name} ({type(module).__name__}) was called with "
            f"{len(inputs)} positional arguments and returned a {type(output).__name__}. Match a part of it that does."
        )
    x, mode = inputs[0], module.training
    module.eval()
    for batch_dims in range(x.dim() - 1, 0, -1):
        if _is_batched(module, x, output, batch_dims):
            module.train(mode)
            return tuple(x.shape[batch_dims:])
    module.train(mode)
    raise ValueError(
        f"The items of a batch are routed one by one, and {name} ({type(module).__name__}) mixes them: its output for "
        f"{tuple(x.shape)} is not that of its items. Match a part of it that does not."
    )


def _is_batched(module: nn.Module, x: Tensor, output: Tensor, batch_dims: int) -> bool:
    """Whether a module returns the same for all items in one batch, and for the first half of them alone."""
    if output.shape[:batch_dims] != x.shape[:batch_dims]:
        return False
    items = x.reshape(-1, *x.shape[batch_dims:])
    expected = output.reshape(-1, *output.shape[batch_dims:])
    half = max(math.ceil(len(items) / 2), 1)
    try:
        found = module(items[:half])
    except Exception:
        return False
    return found.shape == expected[:half].shape and torch.allclose(found, expected[:half], rtol=1e-3, atol=1e-4)
