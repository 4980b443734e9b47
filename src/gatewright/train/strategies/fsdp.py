"""Sharded data parallelism: torch's FSDP2 over the dense parameters, and over the copies of spread experts."""

import contextlib
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from gatewright.parallel import Rows, expert_parameters, spread_layers
from gatewright.train.strategies.ddp import DDPStrategy


class FSDPStrategy(DDPStrategy):
    """Each process keeps a shard of every dense parameter, with its gradient and what the optimizer keeps of it.

    FSDP2 (https://arxiv.org/abs/2304.11277) gathers a parameter where it is used. Dense parameters are sharded over all
    processes, an expert's over those that hold the same expert; where only one does, it is whole there.
    """

    def setup(self, model: nn.Module, *, wrap: bool = True) -> nn.Module:
        """Shard the experts among their copies, then all the rest among everyone."""
        assert wrap, "an engine that shards by itself is not used with FSDP"
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]  # FSDP2 takes no other
        network = self._shard_experts(model)
        for _, layer, _ in spread_layers(model) if self.replicas > 1 else ():
            layer.experts.register_forward_hook(_whole_output)
            fully_shard(layer.experts, mesh=self.mesh["replica"])
        everyone = init_device_mesh(self.mesh.device_type, (self.world_size,))
        own = {parameter for _, parameter in expert_parameters(model)}
        model.register_forward_hook(_whole_output)
        # The model itself, because evaluation calls it directly. Its parameters stay whole until backward: gradients of
        # auxiliary losses may reach them before those of the logits, at which FSDP would gather them again.
        fully_shard(model, mesh=everyone, ignored_params=own, reshard_after_forward=False)
        model.register_forward_hook(_reshard_after_evaluation)
        return network

    @contextlib.contextmanager
    def no_backward_sync(self, network: nn.Module, *, enabled: bool) -> Iterator[None]:
        """Leave out FSDP's reduce-scatter."""
        model = network.network
        assert isinstance(model, FSDPModule)
        model.set_requires_gradient_sync(not enabled)
        yield

    def reduce_gradients(self, model: nn.Module) -> None:
        """Average the experts' gradients: FSDP has taken their mean over the copies of an expert, if there are any."""
        if self.replicas == 1:
            super().reduce_gradients(model)
            return
        for _, parameter in expert_parameters(model):
            if parameter.grad is not None:
                parameter.grad /= self.mesh["expert"].size()

    def gather_state(
        self, tensors: dict[str, Tensor], model: nn.Module, *, part: bool = False
    ) -> Mapping[str, Tensor | Rows]:
        """Put shards together, then experts; or pick this process's."""
        return super().gather_state(_unsharded(tensors), model, part=part)

    def load_state(self, tensors: Mapping[str, Tensor | Rows], model: nn.Module) -> dict[str, Tensor]:
        """Pick this process's experts, and its shard of everything."""
        like = dict(model.named_parameters())
        picked = super().load_state(tensors, model)
        return {name: _shard_like(value, like.get(name.rsplit("|", 1)[0])) for name, value in picked.items()}


def _whole_output(model: nn.Module, inputs: object, output: Tensor) -> Tensor:
    """Copy what is a view: FSDP warns of those."""
    return output.clone() if output._is_view() else output


def _reshard_after_evaluation(model: nn.Module, inputs: object, output: Tensor) -> None:
    """Free the unsharded parameters, since no backward pass will do it."""
    assert isinstance(model, FSDPModule)
    if not torch.is_grad_enabled():
        model.reshard()


def _unsharded(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.full_tensor() if isinstance(value, DTensor) else value for name, value in tensors.items()}


def _shard_like(value: Tensor, like: Tensor | None) -> Tensor:
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
