"""The sizes of any network, found by running it on a few items: bytes kept, arithmetic, operations, rows sent."""

import contextlib
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Size, Tensor, nn
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
class Use:
    """The use of memory and arithmetic by a training forward.

    Args:
        saved: Bytes kept for backward, parameters left out, each memory counted once.
        flops: Arithmetic; a multiplication and an addition are two.
        operations: Number of operations that PyTorch starts.
    """

    saved: int = 0
    flops: int = 0
    operations: int = 0


class Meter(TorchDispatchMode):
    """Measures what runs inside it: in some modules, and outside of them.

    Attributes:
        inside: The use of these modules together.
        outside: The use of everything else.
        trips: Rows that came to each of these modules, and those that it returned, in order of the calls.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.inside, self.outside, self.trips = Use(), Use(), list[tuple[Tensor, Tensor]]()
        self.flops, self._place = flop_counter(), self.outside
        self._parameters = {parameter.untyped_storage().data_ptr() for parameter in network.parameters()}
        self._kept: dict[int, Tensor] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._place.operations += 1
        return func(*args, **(kwargs or {}))

    def enter(self, *_: Any) -> None:
        """Count for the modules from now on: a hook before their forward."""
        self.settle(self.inside)

    def leave(self, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        """Count for everything else from now on: a hook behind their forward."""
        self.settle(self.outside)
        self.trips.append((args[0], output))

    def settle(self, place: Use) -> None:
        """Add the arithmetic since the last time to where it was done, and go on to another place."""
        self._place.flops += self.flops.get_total_flops()
        self.flops.flop_counts.clear()
        self._place = place

    def keep(self, tensor: Tensor) -> Tensor:
        """Count the memory of a tensor that is saved for backward, once; parameters are there anyway."""
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._parameters and storage.data_ptr() not in self._kept:
            self._kept[storage.data_ptr()] = tensor  # Held, so that no other tensor gets its address.
            self._place.saved += storage.nbytes()
        return tensor


def flop_counter() -> FlopCounterMode:
    """Return torch's counter of arithmetic, with the formula for grouped matrix products that it lacks."""
    grouped = (torch.ops.aten._grouped_mm, torch.ops.gatewright.grouped_mm_loop)
    return FlopCounterMode(display=False, custom_mapping=dict.fromkeys(grouped, _grouped_mm_flops))


def _grouped_mm_flops(rows: Size, weight: Size, *_: Any, **__: Any) -> int:
    """Each row meets one expert's matrix."""
    return 2 * rows[0] * weight[1] * weight[2]


def measure(
    network: nn.Module, items: Tensor, parts: Collection[nn.Module] = (), context: Context = contextlib.nullcontext
) -> Meter:
    """Run a training forward of a network on a batch, and count what it takes inside some modules and outside."""
    meter = Meter(network)
    handles = [part.register_forward_pre_hook(meter.enter) for part in parts]
    handles += [part.register_forward_hook(meter.leave) for part in parts]
    with context(), saved_tensors_hooks(meter.keep, lambda tensor: tensor), meter, meter.flops:
        network(items)
        if any(True for _ in moe_layers(network)):
            aux_loss(network)
    meter.settle(meter.outside)
    for handle in handles:
        handle.remove()
    return meter


def measure_sizes(
    network: nn.Module,
    make_items: Callable[[int], Tensor],
    *,
    items: int,
    state: Callable[[Iterable[nn.Parameter]], int],
    context: Context = contextlib.nullcontext,
) -> Sizes:
    """Return the sizes of a network with any number of mixtures of one kind, or none; then an item is a token.

    The network is made on the meta device, however large, and comes back spoiled: it gets memory and noise for weights,
    and of experts that are modules, one stands for all of its layer. Two forwards tell what is kept per token, and what
    once. Grouped experts are measured by rows, of which their fused way keeps fewer.

    Args:
        network: The network, on the meta device.
        make_items: Function that makes a batch of so many items.
        items: Items of one step, on all processes.
        state: Function that returns how many numbers the optimizer keeps for some parameters.
        context: Makes the context in which the network runs, such as autocast.

    Raises:
        ValueError: If the network has mixtures of several kinds, or one whose router mixes tokens in place of choosing.
    """
    layers = _mixtures(network)
    experts = [list(layer.experts.parameters()) for layer in layers]
    rest = list(set(network.parameters()).difference(*experts))
    num_experts, top_k = (layers[0].router.num_experts, layers[0].router.top_k) if layers else (1, 1)
    copies = max(len(layers), 1) * num_experts
    parameters, states = sum(map(_count, experts)) // copies, sum(map(state, experts)) // copies
    in_memory = _keep_one_of_each(layers)
    _fill(network)
    parts = [layer.experts for layer in layers]
    few, more = (measure(network, make_items(count), parts, context) for count in (FEW, 2 * FEW))
    tokens_per_item = int(layers[0].routing.sums.num_tokens) // (2 * FEW) if layers and layers[0].routing else 1
    rows = sum(len(arrived) for arrived, _ in few.trips)
    first = few.trips[0] if few.trips else None
    return Sizes(
        tokens=items * tokens_per_item,
        tokens_per_item=tokens_per_item,
        dense=_part(few.outside, more.outside, FEW * tokens_per_item, _count(rest), state(rest)),
        expert=_part(few.inside, more.inside, rows, parameters, states, copies, in_memory),
        num_experts=num_experts,
        top_k=top_k,
        layers=len(layers),
        sent_bytes=first[0][0].nbytes if first else 0,
        returned_bytes=first[1][0].nbytes if first else 0,
        kept_bytes=0,  # They are in what the dense part keeps per token.
        item_gradient=first is not None and first[0].requires_grad,
    )


def _part(few: Use, more: Use, rows: int, parameters: int, state: int, copies: int = 1, in_memory: int = 1) -> Part:
    """Tell what a part takes per row, and what once, from forwards of so many rows and of twice as many.

    Operations are a mean over all copies, idle ones included, and what is kept once is one over those in memory.
    """
    saved = (more.saved - few.saved) / max(rows, 1)
    return Part(
        parameters=parameters,
        state=state,
        flops=few.flops / max(rows, 1),
        saved=saved,
        fixed=max(0.0, few.saved - rows * saved) / in_memory,
        operations=few.operations // copies,
    )


def _mixtures(network: nn.Module) -> list[ExpertLayer]:
    layers = [layer for _, layer in moe_layers(network) if isinstance(layer, ExpertLayer)]
    kinds = {
        (type(layer.experts), layer.router.num_experts, layer.router.top_k, layer.item_shape, layer.output_shape)
        for layer in layers
    }
    if len(kinds) > 1 or any(isinstance(layer, SoftMoE) for layer in layers):
        raise ValueError(
            "A plan is for mixtures of one kind, whose routers choose experts; got "
            f"{', '.join(map(_described, layers))}. Give sizes in place of a recipe."
        )
    return layers


def _described(layer: ExpertLayer) -> str:
    router = layer.router
    return f"{type(router).__name__} with top_k={router.top_k} of num_experts={router.num_experts}"


def _keep_one_of_each(layers: Iterable[ExpertLayer]) -> int:
    """Drop no row, and let one expert stand for all of a layer where they are modules; return how many are left."""
    left = 0
    for layer in layers:
        layer.dispatcher = Dropless()
        if isinstance(layer.experts, ModuleExperts):
            modules = layer.experts.experts
            for place in range(1, len(modules)):
                modules[place] = modules[0]
        left += 1 if isinstance(layer.experts, ModuleExperts) else layer.router.num_experts
    return max(left, 1)


def _fill(network: nn.Module) -> None:
    network.to_empty(device="cpu").train()
    for tensor in network.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and tensor.is_floating_point():
            nn.init.normal_(tensor, std=0.02)
        elif isinstance(tensor, Tensor):
            tensor.zero_()


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)
