"""The experts of a mixture that exists: some are kept, left out or copied, and the rows of the router go with them."""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from gatewright.experts import Experts, ModuleExperts
from gatewright.layers import MoE
from gatewright.layers.base import moe_layers
from gatewright.names import known
from gatewright.routers import Biased, NoisyTopK, Sinkhorn, TopK
from gatewright.routers.expert_bias import ExpertBias
from gatewright.routers.gate import Gate
from gatewright.surgery.split import noise_like

ROW_PER_EXPERT = (TopK, NoisyTopK, Biased, Sinkhorn)
"""The routers every tensor of which has one row per expert."""

Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer] | None
"""The optimizer of a model, or several that share its parameters."""

Successors = dict[nn.Parameter, list[tuple[nn.Parameter, list[int] | None]]]
"""What takes the place of each parameter, and which of its rows that holds where it does not hold all."""


def select(
    model: nn.Module,
    experts: Sequence[int] | Mapping[str, Sequence[int]],
    *,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Keep some experts of every mixture, in the order given, and leave the others out.

    Args:
        model: A model with mixtures. It is changed in place, and returned.
        experts: Indices of the experts to keep; or these by the name of the layer, as `gatewright.moe_layers` gives it,
            where the layers without a name stay as they are.
        optimizer: The model's optimizer, or several. They go on with the parameters that are kept, and their rows of
            the state.

    Raises:
        ValueError: If an index is no expert's or comes twice, fewer experts are kept than a token goes to, or a layer
            is not a mixture of which single experts can be taken; the model is as it was.
    """
    layers = mixtures_of(model, experts if isinstance(experts, Mapping) else None)
    chosen = experts if isinstance(experts, Mapping) else dict.fromkeys(layers, experts)
    for name, kept in chosen.items():
        router = layers[name].router
        if len(set(kept)) < len(kept) or not set(kept) <= set(range(router.num_experts)):
            raise ValueError(
                f"The experts to keep are different indices from 0 to {router.num_experts - 1}; got {list(kept)} for "
                f"{name or 'the layer'}. Call grow for copies."
            )
        check_top_k(name, len(kept), router.top_k)
    take({name: (layers[name], list(kept)) for name, kept in chosen.items()}, optimizer)
    return model


def prune(
    model: nn.Module,
    num_experts: int,
    scores: Mapping[str, Tensor],
    *,
    optimizer: Optimizers = None,
) -> dict[str, list[int]]:
    """Leave out the experts of the lowest scores, and return which these were, by the name of the layer.

    Args:
        model: A model with mixtures. It is changed in place.
        num_experts: Number of experts that each layer keeps.
        scores: A number for each expert ``(experts,)``, by the name of the layer, as `expert_scores` measures it.
            Layers without scores stay as they are. Of equal scores the expert with the lower index is kept.
        optimizer: The model's optimizer, as in `select`.

    Raises:
        ValueError: If there are no such numbers, and as in `select`.
    """
    kept, removed = {}, {}
    layers = mixtures_of(model, scores)
    for name, score in scores.items():
        total = layers[name].router.num_experts
        if score.shape != (total,) or not 0 < num_experts <= total:
            raise ValueError(
                f"Of experts that have one score each, at least one is kept, and at most all; got {num_experts} to "
                f"keep of {total}, and scores of shape {tuple(score.shape)} for {name or 'the layer'}."
            )
        order = score.sort(descending=True, stable=True).indices.tolist()
        kept[name], removed[name] = sorted(order[:num_experts]), sorted(order[num_experts:])
    select(model, kept, optimizer=optimizer)
    return removed


@torch.no_grad()
def grow(
    model: nn.Module,
    num_experts: int,
    *,
    top_k: int | None = None,
    noise: float = 0.0,
    generator: torch.Generator | None = None,
    optimizer: Optimizers = None,
) -> nn.Module:
    """Give every mixture more experts, copies of those that it has in turn, with copies of their rows of the router.

    With twice the experts and twice the `top_k` a layer computes in evaluation what it computed before, where its
    weights are normalised over the chosen experts or come from a softmax over all. Copies without noise stay equal for
    as long as the same tokens go to them.

    Args:
        model: A model with mixtures. It is changed in place, and returned.
        num_experts: Number of experts of each mixture afterwards.
        top_k: Experts per token afterwards; by default as before.
        noise: Standard deviation of the noise on the copies and on their rows of the router, as a share of that of each
            parameter's values.
        generator: Generator that the noise is drawn from; by default torch's own.
        optimizer: The model's optimizer, as in `select`; copies begin with a copy of its state.

    Raises:
        ValueError: If a layer has more experts already, top_k or noise is out of range, or a layer is not a mixture of
            which single experts can be taken; the model is as it was.
    """
    layers = mixtures_of(model)
    before = {name: layer.router.num_experts for name, layer in layers.items()}
    for name, layer in layers.items():
        if num_experts < before[name] or not 0 <= noise < float("inf"):
            raise ValueError(
                f"A mixture grows to at least the experts that it has, with noise that is finite and not negative; got "
                f"num_experts={num_experts} for {before[name]} experts of {name or 'the layer'}, and noise={noise}."
            )
        check_top_k(name, num_experts, layer.router.top_k if top_k is None else top_k)
    turns = {name: [expert % before[name] for expert in range(num_experts)] for name in layers}
    take({name: (layer, turns[name]) for name, layer in layers.items()}, optimizer)
    for name, layer in layers.items():
        layer.router.top_k = layer.router.top_k if top_k is None else top_k
        for expert in range(before[name], num_experts):
            for values in (*expert_tensors(layer.experts, expert), *router_rows(layer.router, expert)):
                if values.numel() > 1:
                    values.add_(noise_like(values, noise, generator))
    return model


def mixtures_of(model: nn.Module, names: Iterable[str] | None = None) -> dict[str, MoE]:
    """Return the mixtures of a model by name: all of them, or those of some names.

    Raises:
        ValueError: If there is none, or one of which single experts cannot be taken.
    """
    layers = dict(moe_layers(model))
    if not layers:
        raise ValueError("This model has no mixture. Call upcycle first.")
    chosen = layers if names is None else {name: layers[known(name, layers, "mixture")] for name in names}
    for name, layer in chosen.items():
        if not isinstance(layer, MoE) or type(layer.router) not in ROW_PER_EXPERT:
            raise ValueError(
                "Experts are taken of a gatewright.MoE whose router has one row per expert, which is "
                f"{', '.join(router.__name__ for router in ROW_PER_EXPERT)}; {name or 'the layer'} is a "
                f"{type(layer).__name__} with {type(layer.router).__name__}. Name other layers alone."
            )
        check_experts_here(name, layer)
        parts = [layer.experts, *layer.router.children()]
        if any(map(is_parametrized, parts)) or not all(isinstance(part, Gate | ExpertBias) for part in parts[1:]):
            raise ValueError(
                f"Experts are taken where their tensors are stored; in {name or 'the layer'} an adapter, a "
                "parametrization or a gate of another class is in the way. Merge or remove it first."
            )
    return {name: layer for name, layer in chosen.items() if isinstance(layer, MoE)}


def check_experts_here(name: str, layer: MoE) -> None:
    """Refuse experts that cannot be told apart, or are not all in this process.

    Raises:
        ValueError: If they are.
    """
    experts, total = layer.experts, layer.router.num_experts
    if not (experts.stacked or isinstance(experts, ModuleExperts)) or experts.num_experts != total:
        raise ValueError(
            "Experts are taken of GroupedFeedForward or ModuleExperts that are all in this process; "
            f"{name or 'the layer'} has {experts.num_experts} of {total} experts here, in {type(experts).__name__}. "
            "Change the model before it is spread over processes."
        )


def expert_tensors(experts: Experts, expert: int) -> Iterator[Tensor]:
    """Yield every parameter of one expert: the expert's own, or a view of its part of a stacked one."""
    if isinstance(experts, ModuleExperts):
        yield from experts.experts[expert].parameters()
    else:
        yield from (parameter[expert] for parameter in experts.parameters())


def router_rows(router: nn.Module, expert: int) -> Iterator[Tensor]:
    """Yield a view of one expert's row of every floating-point tensor of a router."""
    yield from (tensor[expert] for tensor in router.state_dict().values() if tensor.is_floating_point())


def take(experts: Mapping[str, tuple[MoE, list[int]]], optimizer: Optimizers) -> None:
    """Give each layer the experts of some indices, copies where an index comes again, and carry the optimizer over."""
    successors: Successors = {}
    for layer, index in experts.values():
        if isinstance(layer.experts, ModuleExperts):
            _take_modules(layer.experts, index, successors)
        else:
            _take_rows(layer.experts, index, successors)
        for part in layer.router.children():
            _take_rows(part, index, successors)
            if isinstance(part, Gate):
                part.out_features = len(index)
        layer.experts.num_experts = layer.router.num_experts = len(index)
        layer.routing = None  # It speaks of the experts that were.
        layer.watch()
    for each in (optimizer,) if isinstance(optimizer, torch.optim.Optimizer) else optimizer or ():
        _carry(each, successors)


def _take_modules(experts: ModuleExperts, index: list[int], successors: Successors) -> None:
    for parameter in experts.parameters():
        successors[parameter] = []
    taken: list[nn.Module] = []
    for place, expert in enumerate(index):
        original = experts.experts[expert]
        module = copy.deepcopy(original) if expert in index[:place] else original
        taken.append(module)
        for old, new in zip(original.parameters(), module.parameters(), strict=True):
            successors[old].append((new, None))
    experts.experts = nn.ModuleList(taken)


def _take_rows(module: nn.Module, index: list[int], successors: Successors) -> None:
    for name, parameter in list(module.named_parameters(recurse=False)):
        taken = nn.Parameter(parameter.detach()[index], requires_grad=parameter.requires_grad)
        successors[parameter] = [(taken, index)]
        setattr(module, name, taken)
    for name, buffer in list(module.named_buffers(recurse=False)):
        setattr(module, name, buffer[index])


def _carry(optimizer: torch.optim.Optimizer, successors: Successors) -> None:
    """Have an optimizer go on with the parameters that took the place of others, and with what it keeps of them."""
    for group in optimizer.param_groups:
        group["params"] = [new for old in group["params"] for new, _ in successors.get(old, [(old, None)])]
    for old, taken in successors.items():
        kept = optimizer.state.pop(old, {})
        for new, index in taken if kept else []:
            optimizer.state[new] = {name: _rows_of(value, len(old), index) for name, value in kept.items()}


def _rows_of(value: Any, num_rows: int, index: list[int] | None) -> Any:
    """Return a copy of a part of an optimizer's state; what has no row per expert, such as a step count, is copied."""
    has_rows = isinstance(value, Tensor) and value.dim() > 0 and len(value) == num_rows
    return value[index] if has_rows and index is not None else copy.deepcopy(value)


def check_top_k(name: str, num_experts: int, top_k: int) -> None:
    """Refuse fewer experts than a token goes to.

    Raises:
        ValueError: If so.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(
            f"A token goes to at least one and at most all experts; got top_k={top_k} and {num_experts} experts for "
            f"{name or 'the layer'}."
        )
