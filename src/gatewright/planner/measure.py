"""The sizes of any network with a mixture, found by running it on a few items: bytes kept, arithmetic, rows sent."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gatewright.dispatch import Dropless
from gatewright.experts import ModuleExperts
from gatewright.layers import ExpertLayer, SoftMoE
from gatewright.layers.base import aux_loss, moe_layers
from gatewright.planner.sizes import Part, Sizes

FEW = 8
Context = Callable[[], contextlib.AbstractContextManager[object]]


@dataclass
class Saved:
    """Bytes that a training forward keeps for backward, parameters left out, each memory counted once.

    Args:
        inside: By the part that was asked for.
        outside: By everything else.
        flops: Of that part, and of everything.
        operations: That PyTorch started for that part, and for everything else.
        trip: Rows that came to that part, and those that it returned.
    """

    inside: int = 0
    outside: int = 0
    flops: tuple[int, int] = (0, 0)
    operations: tuple[int, int] = (0, 0)
    trip: tuple[Tensor, Tensor] | None = None


class OperationCounter(TorchDispatchMode):
    """Counts the operations that PyTorch starts, by what `place` says when each starts."""

    def __init__(self, place: Callable[[], bool]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.place = place
        self.counts = Counter[bool]()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self.counts[self.place()] += 1
        return func(*args, **(kwargs or {}))


def saved_bytes(network: nn.Module, items: Tensor, part: str | None = None, context: Context | None = None) -> Saved:
    """Run a training forward and count what it keeps.

    Args:
        network: Any, in training.
        items: A batch.
        part: Name of a module inside that is counted by itself; None for none.
        context: In which the network runs, such as autocast.
    """
    known = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
    kept: dict[bool, dict[int, Tensor]] = {True: {}, False: {}}
    found, inside = Saved(), [False]

    def pack(tensor: Tensor) -> Tensor:
        if (place := tensor.untyped_storage().data_ptr()) not in known:
            kept[inside[0]][place] = tensor
        return tensor

    def leave(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inside[0], found.trip = False, (args[0], output)

    module = nn.Identity() if part is None else network.get_submodule(part)
    handles = [module.register_forward_pre_hook(lambda *_: inside.__setitem__(0, True))]
    handles += [module.register_forward_hook(leave)]
    hooks, operations = saved_tensors_hooks(pack, lambda tensor: tensor), OperationCounter(lambda: inside[0])
    with (context or contextlib.nullcontext)(), hooks, operations:
        with FlopCounterMode(display=False) as counter:
            output = network(items)
        if any(True for _ in moe_layers(network)):
            output = output, aux_loss(network)
    for handle in handles:
        handle.remove()
    counts = {name: sum(of.values()) for name, of in counter.get_flop_counts().items()}
    found.operations = operations.counts[True], operations.counts[False]
    found.flops = counts.get(f"{type(network).__name__}.{part}", 0), counts.get("Global", 0)
    found.inside, found.outside = (
        sum(t.untyped_storage().nbytes() for t in kept[where].values()) for where in (True, False)
    )
    return found


def measure_sizes(
    network: nn.Module,
    make_items: Callable[[int], Tensor],
    *,
    tokens: int,
    state: Callable[[Iterable[nn.Parameter]], int],
    context: Context | None = None,
) -> Sizes:
    """Return the sizes of a network with one mixture of modules, or none; an item is a token.

    The network is made on the meta device, however large, and comes back spoiled: what is not an expert gets memory and
    noise for weights, and one expert stands for all. Two forwards tell what is kept per item, and what once.

    Args:
        network: On the meta device.
        make_items: Makes a batch of so many items.
        tokens: Of one step, on all processes.
        state: Returns how many numbers the optimizer keeps for some parameters.
        context: In which the network runs, such as autocast.

    Raises:
        ValueError: If the network has several mixtures, or one whose router mixes tokens in place of choosing.
    """
    name, layer = _only_mixture(network)
    experts = [] if layer is None else list(layer.experts.parameters())
    outer = list(set(network.parameters()) - set(experts))
    rest = Part(parameters=_count(outer), state=state(outer))
    expert = Part()
    if layer is not None:
        first = _keep_first(layer)
        expert = Part(parameters=_count(first.parameters()), state=state(first.parameters()))
    _fill(network)
    part = None if layer is None else f"{name}.experts" if name else "experts"
    few = saved_bytes(network, make_items(FEW), part, context)
    # On average over the experts: one without rows is not called, and starts few.
    expert_operations = few.operations[0] // (1 if layer is None else layer.router.num_experts)
    more = saved_bytes(network, make_items(2 * FEW), part, context)
    top_k = 1 if few.trip is None else len(few.trip[0]) // FEW
    rows = FEW * top_k
    expert_flops, all_flops = few.flops
    dense_saved, expert_saved = (more.outside - few.outside) / FEW, (more.inside - few.inside) / rows
    return Sizes(
        tokens=tokens,
        dense=replace(
            rest,
            flops=(all_flops - expert_flops) / FEW,
            saved=dense_saved,
            fixed=max(0.0, few.outside - FEW * dense_saved),
            operations=few.operations[1],
        ),
        expert=replace(
            expert,
            flops=expert_flops / rows,
            saved=expert_saved,
            fixed=max(0.0, few.inside - rows * expert_saved),
            operations=expert_operations,
        ),
        num_experts=1 if layer is None else layer.router.num_experts,
        top_k=top_k,
        layers=0 if layer is None else 1,
        sent_bytes=0 if few.trip is None else few.trip[0][0].nbytes,
        returned_bytes=0 if few.trip is None else few.trip[1][0].nbytes,
        kept_bytes=0,  # They are in what the dense part keeps per token.
        item_gradient=few.trip is not None and few.trip[0].requires_grad,
    )


def _only_mixture(network: nn.Module) -> tuple[str, ExpertLayer | None]:
    layers = [(name, layer) for name, layer in moe_layers(network) if isinstance(layer, ExpertLayer)]
    if len(layers) > 1 or any(isinstance(layer, SoftMoE) for _, layer in layers):
        raise ValueError(
            f"A plan is for one mixture whose router chooses experts; got {len(layers)} of them, with routers "
            f"{', '.join(type(layer.router).__name__ for _, layer in layers)}. Give sizes in place of a recipe."
        )
    return layers[0] if layers else ("", None)


def _keep_first(layer: ExpertLayer) -> nn.Module:
    """Let one expert, with memory, stand for all, and drop no row."""
    assert isinstance(layer.experts, ModuleExperts)
    layer.dispatcher = Dropless()
    modules = layer.experts.experts
    first = modules[0]
    for place in range(1, len(modules)):
        modules[place] = first
    return first


def _fill(network: nn.Module) -> None:
    network.to_empty(device="cpu").train()
    for tensor in network.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.02)
        elif isinstance(tensor, Tensor):
            tensor.zero_()


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
