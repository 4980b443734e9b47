"""Merging: alike experts become one, and the experts of a whole mixture one dense module."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain, combinations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewright.experts import Experts, GroupedFeedForward, ModuleExperts
from gatewright.extras import require
from gatewright.kernels.plain import activate
from gatewright.layers import MoE, ResidualMixture
from gatewright.surgery.experts import Optimizers, check_top_k, expert_tensors, mixtures_of, router_rows, take
from gatewright.surgery.feed_forward import FeedForward, hidden_units_of


@torch.no_grad()
def merge(model: nn.Module, num_experts: int, *, optimizer: Optimizers = None) -> dict[str, list[list[int]]]:
    """Merge the experts of every mixture that are most alike, and return which ones each expert is made of.

    Hidden units have no order of their own. Those of two experts are therefore matched first, so that the sum of their
    dot products is the largest (https://arxiv.org/abs/2209.04836; of experts, https://arxiv.org/abs/2310.01334). The
    two experts at the least distance then become their mean, as do their rows of the router, and so on until there are
    few enough. A merged expert has the weight of all that it is made of.

    Args:
        model: A model with mixtures of feed-forward blocks of one size. It is changed in place.
        num_experts: Number of experts of each mixture afterwards.
        optimizer: The model's optimizer, as in `select`. A merged expert goes on with the state of its first.

    Returns:
        Lists of the indices that the experts had, by the name of the layer.

    Raises:
        ValueError: If a layer has too few experts, its experts are not feed-forward blocks of one size, or it is not a
            mixture of which single experts can be taken; the model is as it was.
        ImportError: If scipy is not installed, which matches the hidden units.
    """
    layers = mixtures_of(model)
    for name, layer in layers.items():
        if num_experts > layer.router.num_experts:
            raise ValueError(
                f"Merging leaves at most the experts that there are; got num_experts={num_experts} for "
                f"{layer.router.num_experts} experts of {name or 'the layer'}. Call grow for more."
            )
        check_top_k(name, num_experts, layer.router.top_k)
        _check_mergeable(name, layer.experts)
    merged = {name: _merge_alike(layer, num_experts) for name, layer in layers.items()}
    take({name: (layer, [first for first, *_ in merged[name]]) for name, layer in layers.items()}, optimizer)
    return merged


@torch.no_grad()
def densify(model: nn.Module, weights: Mapping[str, Sequence[float] | Tensor] | None = None) -> nn.Module:
    """Put one dense module in place of every mixture: the mean of its experts, whose hidden units are matched first.

    It is the experts' own module, or a `FeedForward` in place of `GroupedFeedForward`. Mixtures of equal experts, such
    as `upcycle` makes, compute the same afterwards where the weights of an item sum to 1. Other mixtures lose, and are
    trained further, with a new optimizer.

    Args:
        model: A model with mixtures of feed-forward blocks of one size. It is changed in place, and returned.
        weights: Weight of each expert in the mean, by the name of the layer, such as ``expert_scores(model, inputs,
            by="load")`` returns; layers without weights stay as they are. By default all layers, and equal weights.

    Raises:
        ValueError: If the weights do not fit; if a layer is the model itself, has a shared expert or is a part of a
            `ResidualMixture`; if its experts are not feed-forward blocks of one size, or it is not a mixture of which
            single experts can be taken. The model is as it was.
        ImportError: If scipy is not installed, which matches the hidden units.
    """
    layers = mixtures_of(model, weights)
    shares = {name: torch.ones(layer.router.num_experts) for name, layer in layers.items()}
    shares |= {name: torch.as_tensor(weight, dtype=torch.float64) for name, weight in (weights or {}).items()}
    for name, layer in layers.items():
        _check_dense(model, name, layer, shares[name])
    dense = {layer: _mean_expert(layer, shares[name].tolist()) for name, layer in layers.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, MoE) and module in dense:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, dense[module])
    return model


def _merge_alike(layer: MoE, num_experts: int) -> list[list[int]]:
    members = {expert: [expert] for expert in range(layer.router.num_experts)}
    distance = partial(_distance, layer.experts)
    distances = {pair: distance(*pair) for pair in combinations(members, 2)}
    while len(members) > num_experts:
        one, other = min(distances, key=distances.__getitem__)
        _average(layer, one, other, len(members[other]) / (len(members[one]) + len(members[other])))
        members[one] += members.pop(other)
        distances = {pair: value for pair, value in distances.items() if not {one, other} & {*pair}}
        pairs = [(min(one, expert), max(one, expert)) for expert in members if expert != one]
        distances |= {pair: distance(*pair) for pair in pairs}
    return list(members.values())


def _mean_expert(layer: MoE, weights: list[float]) -> nn.Module:
    """Return the weighted mean of all experts, as a module."""
    total = weights[0]
    for expert, weight in list(enumerate(weights))[1:]:
        total += weight
        if weight > 0:
            _average(layer, 0, expert, weight / total)
    return _module_of_first(layer.experts).train(layer.training)


def _average(layer: MoE, one: int, other: int, share: float) -> None:
    """Make an expert the mean of itself and a share of another one, whose hidden units are brought into its order."""
    order = _matched(layer.experts, one, other)
    for units in hidden_units(layer.experts, other):
        units.copy_(units[order])
    tensors = [chain(expert_tensors(layer.experts, each), router_rows(layer.router, each)) for each in (one, other)]
    for kept, merged in zip(*tensors, strict=True):
        kept.lerp_(merged, share)


def hidden_units(experts: Experts, expert: int) -> list[Float[Tensor, "units *numbers"]]:
    """Return a view of every tensor of an expert that belongs to its hidden units, with the units first.

    Raises:
        ValueError: If the expert is not a feed-forward block.
    """
    if isinstance(experts, ModuleExperts):
        units = hidden_units_of(experts.experts[expert])
        biases = [layer.bias.detach() for layer in units.before if layer.bias is not None]
        return [*(layer.weight.detach() for layer in units.before), units.after.weight.detach().t(), *biases]
    assert isinstance(experts, GroupedFeedForward)
    parts = 2 if experts.activation == "swiglu" else 1
    biases = [] if experts.bias_in is None else [*experts.bias_in.detach()[expert].chunk(parts)]
    return [*experts.weight_in.detach()[expert].t().chunk(parts), experts.weight_out.detach()[expert], *biases]


def _matrix(experts: Experts, expert: int) -> Float[Tensor, "units numbers"]:
    return torch.cat(
        [each.flatten(1) if each.dim() > 1 else each[:, None] for each in hidden_units(experts, expert)], 1
    )


def _matched(experts: Experts, one: int, other: int) -> Int[Tensor, " units"]:
    """Return the order of one expert's hidden units that is nearest to the order of another's."""
    assign: Callable[..., tuple[object, object]] = require("scipy.optimize", "train").linear_sum_assignment
    alike = _matrix(experts, one).double() @ _matrix(experts, other).double().t()
    return torch.as_tensor(assign(alike.cpu().numpy(), maximize=True)[1], device=alike.device)


def _distance(experts: Experts, one: int, other: int) -> float:
    """Return the distance between two experts whose hidden units are matched, over the sum of their lengths."""
    kept, merged = _matrix(experts, one), _matrix(experts, other)[_matched(experts, one, other)]
    return float((kept - merged).norm() / (kept.norm() + merged.norm()))


def _check_mergeable(name: str, experts: Experts) -> None:
    """Refuse experts of which no mean can be taken."""
    if not isinstance(experts, ModuleExperts | GroupedFeedForward):
        raise ValueError(f"GroupedFeedForward and ModuleExperts are merged; {name} has {type(experts).__name__}.")
    sizes = [[tuple(each.shape) for each in expert_tensors(experts, expert)] for expert in range(experts.num_experts)]
    if any(size != sizes[0] for size in sizes):
        raise ValueError(f"Merged experts are of one size; those of {name or 'the layer'} differ. Use prune or select.")
    for expert in experts.experts if isinstance(experts, ModuleExperts) else []:
        units = hidden_units_of(expert)
        known = {id(each) for layer in (*units.before, units.after) for each in layer.parameters()}
        if any(id(each) not in known for each in expert.parameters()):
            raise ValueError(
                "Hidden units are matched in experts whose parameters are those of their linear layers in and out; one "
                f"of {name or 'the layer'} ({type(expert).__name__}) has others. Use prune or select."
            )


def _check_dense(model: nn.Module, name: str, layer: MoE, weights: Tensor) -> None:
    """Refuse a layer in whose place no dense module can stand."""
    _check_mergeable(name, layer.experts)
    if isinstance(layer.experts, GroupedFeedForward) and type(layer.experts) is not GroupedFeedForward:
        raise ValueError(
            f"A dense block has an activation of GroupedFeedForward; {name or 'the layer'} has a "
            f"{type(layer.experts).__name__}. Call merge or prune."
        )
    fits = weights.shape == (layer.router.num_experts,) and bool((weights >= 0).all())
    if not fits or not 0 < weights.sum() < float("inf"):
        raise ValueError(
            f"Each expert has a weight that is finite and not negative, and one of them is above 0; got "
            f"{weights.tolist()} for {layer.router.num_experts} experts of {name or 'the layer'}."
        )
    if (
        not name
        or layer.shared is not None
        or isinstance(model.get_submodule(name.rpartition(".")[0]), ResidualMixture)
    ):
        raise ValueError(
            "A dense module takes the place of a mixture that has no shared expert, inside a model that holds it, and "
            f"not in a ResidualMixture; {name or 'the model itself'} does not do. Densify other layers by name."
        )


def _module_of_first(experts: Experts) -> nn.Module:
    """Return the first expert as a module of its own."""
    if isinstance(experts, ModuleExperts):
        return experts.experts[0]
    assert isinstance(experts, GroupedFeedForward)
    activation = partial(activate, activation=experts.activation)
    into, out = (
        _linear(weight[0], None if bias is None else bias[0])
        for weight, bias in ((experts.weight_in, experts.bias_in), (experts.weight_out, experts.bias_out))
    )
    return FeedForward(into, activation, nn.Dropout(experts.dropout), out)


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    inputs, outputs = weight.shape
    layer = nn.Linear(inputs, outputs, bias is not None, device=weight.device, dtype=weight.dtype)
    layer.weight.copy_(weight.t())
    if bias is not None:
        layer.bias.copy_(bias)
    return layer
