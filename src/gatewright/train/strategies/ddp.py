"""A run on several processes: experts spread over them, and torch's DDP round the rest."""

import contextlib
import inspect
import threading
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from gatewright.experts import ModuleExperts
from gatewright.layers import ExpertLayer
from gatewright.parallel import (
    ExpertParallel,
    ProcessScope,
    Rows,
    SyncBatchNorm,
    average_expert_gradients,
    expert_parameters,
    expert_runs,
    gather_state,
    own_state,
    parallelize,
    part_of_state,
    spread_layers,
    synchronize_batch_norm,
    synchronize_experts,
    total_gradient_norm,
)
from gatewright.parallel.collectives import waiting
from gatewright.routers import Router
from gatewright.scope import BatchScope
from gatewright.train.config import ParallelConfig
from gatewright.train.optim import clip_gradients
from gatewright.train.strategies.single import Reduction, Strategy, WithLosses


class DDPStrategy(Strategy):
    """A run on all processes of torch's default group.

    Args:
        mesh: The device mesh, from `gatewright.parallel.expert_mesh`.
        local_rank: This process's number on its node.
        parallel: Settings of the spread over processes.
        background: Whether a thread beside the training reduces too, and needs a process group of its own.
    """

    mesh: DeviceMesh

    def __init__(
        self, mesh: DeviceMesh, *, local_rank: int = 0, parallel: ParallelConfig | None = None, background: bool = False
    ) -> None:
        self.mesh, self.local_rank, self.config = mesh, local_rank, parallel or ParallelConfig()
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self.steps, self.noted = 0, threading.Event()
        self.replicas = mesh.get_group("replica").size()
        self._background: dist.ProcessGroup | None = None
        if background:
            self._background = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.config.timeout))

    def setup(self, model: nn.Module, *, wrap: bool = True) -> nn.Module:
        """Leave each process its experts, and have torch's DDP keep the rest equal.

        DDP's constructor and its forward overwrite other ranks' parameters and buffers with the first one's: it must
        not see the experts, of which each process has its own.
        """
        network = self._shard_experts(model)
        if not wrap:
            return network
        ignored = [f"network.{name}" for name, _ in expert_parameters(model)]
        ignored += [f"network.{name}" for name in _own_buffers(model)]
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(network, ignored)
        # Synchronised statistics are equal already; each process's own would be those of the first everywhere.
        names = inspect.signature(DistributedDataParallel).parameters
        name = "forward_sync_buffers" if "forward_sync_buffers" in names else "broadcast_buffers"  # until torch 2.12
        broadcast: dict[str, Any] = {name: self.config.batch_norm == "local"}
        # After its first step DDP would put gradients into another order, and a sum of more than two numbers is not the
        # same in every order: a run that is resumed would end with other bits. Where it looks for unused parameters it
        # keeps the order; it warns if it finds none.
        keep_order = self.world_size > 2 and self.mesh.device_type == "cpu"
        if keep_order:
            network.register_parameter("unused", nn.Parameter(torch.zeros(())))
        return DistributedDataParallel(
            network, find_unused_parameters=keep_order, gradient_as_bucket_view=True, **broadcast
        )

    def _shard_experts(self, model: nn.Module) -> nn.Module:
        """Leave each process its experts, and give its routers the view of the global batch."""
        parallelize(model, self.mesh, local_balance=self.config.balance == "local")
        if self.config.batch_norm == "sync":
            self._synchronize(model)
        return WithLosses(model)

    def _synchronize(self, model: nn.Module) -> None:
        """Synchronise every BatchNorm over the processes that hold its module.

        An expert of which no other process has a copy sees all its rows of the global batch where it lives.
        """
        everyone = ProcessScope(_everyone(), device=self.mesh.device_type)
        layers = [layer for layer in model.modules() if isinstance(layer, ExpertLayer)]
        synchronize_batch_norm(model, everyone, leave={layer.experts for layer in layers})
        for layer in layers:
            scope = self._copies_scope(layer)
            if isinstance(scope, ProcessScope) and isinstance(layer.experts, ModuleExperts):
                synchronize_experts(layer.experts, layer.item_shape, scope)

    def _copies_scope(self, layer: ExpertLayer) -> BatchScope:
        """Return the processes that hold copies of the experts that this one holds."""
        group = self.mesh.get_group("replica") if isinstance(layer.dispatcher, ExpertParallel) else _everyone()
        return ProcessScope(group, device=self.mesh.device_type) if group.size() > 1 else BatchScope()

    def shard_batch(self, count: int) -> slice:
        """Return this process's run of a batch's items; the first processes get one more, the last may get none."""
        run = expert_runs(count, self.world_size)[self.rank]
        return slice(run.start, run.stop)

    def no_backward_sync(self, network: nn.Module, *, enabled: bool) -> contextlib.AbstractContextManager[object]:
        """Leave out DDP's all-reduce."""
        assert isinstance(network, DistributedDataParallel)
        return network.no_sync() if enabled else contextlib.nullcontext()

    def reduce_gradients(self, model: nn.Module) -> None:
        """Average the experts' gradients, which DDP leaves alone."""
        average_expert_gradients(model, self.mesh)

    def clip_gradients(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Clip by the norm over all processes, each expert counted once."""
        return clip_gradients(model, max_norm, total_gradient_norm(model, self.mesh))

    def all_reduce(self, tensor: Tensor, op: Reduction = "sum", *, background: bool = False) -> Tensor:
        """Reduce over the default group, or over the one for threads beside the training."""
        if op == "max":
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._background if background else None)
            return tensor
        with waiting.running():
            dist.all_reduce(tensor, group=self._background if background else None)
        return tensor.div_(self.world_size) if op == "mean" else tensor

    def all_gather(self, values: list[float]) -> list[list[float]]:
        """Return the same numbers of every process."""
        own = torch.tensor(values, dtype=torch.float64)
        everyone = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(everyone, own)
        return [theirs.tolist() for theirs in everyone]

    def barrier(self) -> None:
        """Wait for every process."""
        dist.barrier()

    def average_buffers(self, *models: nn.Module) -> None:
        """Average the statistics of every BatchNorm of which each copy has seen its own process's rows alone."""
        for model in models:
            spread = {norm for _, layer, _ in spread_layers(model) for norm in layer.experts.modules()}
            for norm in (module for module in model.modules() if isinstance(module, _BatchNorm)):
                if isinstance(norm, SyncBatchNorm) and isinstance(norm.scope, ProcessScope):
                    continue  # They are equal already.
                own, everyone = (self.replicas, self.mesh.get_group("replica")), (self.world_size, None)
                copies, group = own if norm in spread else everyone
                for buffer in norm.buffers() if copies > 1 else ():
                    total = buffer.double()
                    dist.all_reduce(total, group=group)
                    buffer.copy_(total / copies)

    def report_steps(self, steps: int) -> None:
        """Let the others know how many optimizer steps this process has made."""
        self.steps = steps
        self.noted.set()

    def gather_state(
        self, tensors: dict[str, Tensor], model: nn.Module, *, part: bool = False
    ) -> Mapping[str, Tensor | Rows]:
        """Put the experts' state together on the first process; or pick this process's, and there all the rest too."""
        return part_of_state(tensors, model, self.mesh) if part else gather_state(tensors, model, self.mesh)

    def load_state(self, tensors: Mapping[str, Tensor | Rows], model: nn.Module) -> dict[str, Tensor]:
        """Pick this process's experts."""
        return own_state(tensors, model, self.mesh)


def _everyone() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def _own_buffers(model: nn.Module) -> Iterator[str]:
    """Name the buffers of routers and spread experts: what one process has counted is not another's."""
    prefixes = {name.rsplit(".", 1)[0] for name, _ in expert_parameters(model)}
    prefixes |= {name for name, module in model.named_modules() if isinstance(module, Router)}
    inside = tuple(f"{prefix}." for prefix in prefixes)
    return (name for name, _ in model.named_buffers() if name.startswith(inside))
