"""Spread a model's experts over processes, and keep the rest of it equal on all of them."""

from collections.abc import Iterable, Iterator
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor

from gatewright.experts import Experts
from gatewright.layers import ExpertLayer
from gatewright.layers.base import moe_layers
from gatewright.parallel.collectives import waiting
from gatewright.parallel.dispatcher import ExpertParallel, expert_runs
from gatewright.parallel.scope import ProcessScope


def expert_mesh(ep_size: int, device_type: str = "cpu", *, timeout: float | None = None) -> DeviceMesh:
    """Arrange all processes as ``(replica, expert)``: a row holds all experts, a column the same ones.

    Args:
        ep_size: Processes that share the experts of a layer out among them; it divides the number of processes.
        device_type: Device type of the mesh.
        timeout: Seconds after which a process that waits for others in a row or column gives up; None leaves torch's.

    Raises:
        ValueError: If it does not; the sentence names what does.
    """
    world = dist.get_world_size()
    check_ep_size(ep_size, world)
    mesh = init_device_mesh(device_type, (world // ep_size, ep_size), mesh_dim_names=("replica", "expert"))
    if timeout is not None:  # Torch gives groups half an hour, whatever the default group was given.
        for group in mesh.get_all_groups():
            dist.distributed_c10d._set_pg_timeout(timedelta(seconds=timeout), group)
    return mesh


def check_ep_size(ep_size: int, world: int) -> None:
    """Refuse an expert-parallel size that does not divide the number of processes, and name those that do."""
    if ep_size < 1 or world % ep_size:
        fits = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
        raise ValueError(
            f"ep_size ({ep_size}) divides the number of processes ({world}), so that every process belongs to one full "
            f"set of experts. With {world} processes use ep_size {fits}, or start a multiple of {ep_size} processes."
        )


def parallelize(model: nn.Module, mesh: DeviceMesh, *, local_balance: bool = False) -> nn.Module:
    """Give each process its experts, and its routers the view of the global batch. In place; returns the model.

    Every process makes the whole model first, from the same seed, and keeps a part: the numbers are those of one
    process. What is not an expert stays whole everywhere; averaging its gradients is up to `DistributedDataParallel` or
    FSDP, which `expert_parameters` tells what to leave alone.

    Args:
        model: A model with `MoE` layers.
        mesh: A mesh from `expert_mesh`.
        local_balance: Whether balance statistics stay each process's own, instead of the global batch's.

    Raises:
        ValueError: If a layer has fewer experts than the mesh has processes to hold them, or is inside an expert.
    """
    everyone = dist.group.WORLD
    assert everyone is not None  # a mesh has made it
    ep_group, rank = mesh.get_group("expert"), mesh.get_local_rank("expert")
    if mesh.size() > 1:
        _refuse_mixtures_in_experts(model)
    for name, layer in moe_layers(model):
        layer.scope, layer.local_balance = ProcessScope(everyone, device=mesh.device_type), local_balance
        if isinstance(layer, ExpertLayer) and ep_group.size() > 1:
            _spread(name, layer, ep_group, rank)
    return model


def spread_layers(model: nn.Module) -> Iterator[tuple[str, ExpertLayer, ExpertParallel]]:
    """Yield every layer of whose experts each process holds some, with its name and its dispatcher."""
    for name, layer in moe_layers(model):
        if isinstance(layer, ExpertLayer) and isinstance(layer.dispatcher, ExpertParallel):
            yield name, layer, layer.dispatcher


def expert_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield name and parameter of every expert that is spread over processes."""
    for name, layer, _ in spread_layers(model):
        prefix = f"{name}.experts.".lstrip(".")
        yield from ((f"{prefix}{inner}", parameter) for inner, parameter in layer.experts.named_parameters())


def average_expert_gradients(model: nn.Module, mesh: DeviceMesh) -> None:
    """Make each expert's gradient that of the global mean loss, in a model that `parallelize` has spread over a mesh.

    It has been summed over the processes of a row on the way back through the all-to-all; what is left is the sum over
    the rows, and the number of processes that a mean over each one's loss is divided by.
    """
    found = (parameter.grad for _, parameter in expert_parameters(model))
    gradients = [gradient for gradient in found if gradient is not None]
    sum_in_place(gradients, mesh.get_group("replica"))
    for gradient in gradients:
        gradient /= mesh.size()


def total_gradient_norm(model: nn.Module, mesh: DeviceMesh) -> Tensor:
    """Return the norm of all gradients, with each expert counted once wherever it lives."""
    # In order: a sum of squares has other last digits in another one, and a set's differs from run to run.
    spread = dict.fromkeys(parameter for _, parameter in expert_parameters(model))
    equal = (p.grad for p in model.parameters() if p.grad is not None and p not in spread)
    here = (p.grad for p in spread if p.grad is not None)
    whole, part = _norm(equal), _norm(here)
    squares = part.square()
    with waiting.running():
        dist.all_reduce(squares, group=mesh.get_group("expert"))
    return (whole.square() + squares).sqrt()


def _norm(gradients: Iterable[Tensor]) -> Tensor:
    """Norm of gradients, of which some may be shards: of the whole ones."""
    found = list(gradients)
    whole = nn.utils.get_total_norm([gradient for gradient in found if not isinstance(gradient, DTensor)])
    shards = nn.utils.get_total_norm([gradient for gradient in found if isinstance(gradient, DTensor)])
    if isinstance(shards, DTensor):
        return (whole.to(shards.dtype).square() + shards.full_tensor().square()).sqrt()
    return whole


def sum_in_place(tensors: Iterable[Tensor], group: dist.ProcessGroup) -> None:
    """Add up tensors over a group, in one reduction per dtype."""
    if group.size() == 1:
        return
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        by_dtype.setdefault(tensor.dtype, []).append(tensor)
    for same in by_dtype.values():
        flat = torch.cat([tensor.reshape(-1) for tensor in same])
        with waiting.running():
            dist.all_reduce(flat, group=group)
        for tensor, part in zip(same, flat.split([tensor.numel() for tensor in same]), strict=True):
            tensor.copy_(part.view_as(tensor))


def _refuse_mixtures_in_experts(model: nn.Module) -> None:
    """Refuse a mixture that some processes would call and others, whose expert has no rows, not."""
    for name, layer in moe_layers(model):
        inner = next(moe_layers(layer.experts), None) if isinstance(layer, ExpertLayer) else None
        if inner is not None:
            raise ValueError(
                f"An expert of layer {name or 'MoE'} has a mixture inside it ({inner[0]}). Processes whose tokens do "
                "not reach that expert would not call it, and the others wait for them. Use one process, or take the "
                "inner mixture out."
            )


def _spread(name: str, layer: ExpertLayer, group: dist.ProcessGroup, rank: int) -> None:
    num_experts = layer.router.num_experts
    if num_experts < group.size():
        raise ValueError(
            f"Layer {name or 'MoE'} has {num_experts} experts for {group.size()} processes to share: some would hold "
            f"none. Use ep_size of at most {num_experts}, or more experts."
        )
    if not isinstance(layer.experts, Experts):
        raise ValueError(
            f"The experts of layer {name or 'MoE'} are inside a {type(layer.experts).__name__}, which cannot be spread "
            "over processes. Use ep_size=1, or merge an adapter into the experts first."
        )
    own = expert_runs(num_experts, group.size())[rank]
    layer.experts.keep(own.start, own.stop)
    layer.dispatcher = ExpertParallel(layer.dispatcher, group, num_experts)
    layer.watch()
