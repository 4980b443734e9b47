"""Start equal, split later: one expert learns from every item first, and is then copied into all of them."""

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float, Num
from torch import Tensor, nn

from gatewright.experts import ModuleExperts
from gatewright.layers import ExpertLayer


class StartTogether(nn.Module):
    """A mixture whose first expert serves every item until an epoch, and whose experts then all start as its copies.

    Experts trained from scratch see ``top_k / num_experts`` of the items each, too few where an expert is a whole
    network. This is sparse upcycling (https://arxiv.org/abs/2212.05055) in the middle of a run.

    Args:
        mixture: A mixture of modules of one architecture.
        split_epoch: The epoch, counted from 0, that begins with separate experts.

    Raises:
        TypeError: If the experts are not modules.
        ValueError: If there is no such epoch.
    """

    def __init__(self, mixture: ExpertLayer, split_epoch: int) -> None:
        super().__init__()
        if not isinstance(mixture.experts, ModuleExperts):
            raise TypeError(f"StartTogether copies modules; got {type(mixture.experts).__name__}.")
        if split_epoch < 0:
            raise ValueError(f"split_epoch is an epoch, counted from 0; got {split_epoch}.")
        self.mixture, self.split_epoch, self.together = mixture, split_epoch, True

    def forward(self, x: Float[Tensor, "*shape"], features: Num[Tensor, "*features"] | None = None) -> Tensor:
        """Ask the first expert, or after the split the mixture."""
        if self.together:
            served: Tensor = self.first(x)
            return served
        mixed: Tensor = self.mixture(x, features)
        return mixed

    def begin_epoch(self, epoch: int) -> None:
        """Split once the epoch has come."""
        if not self.together or epoch < self.split_epoch:
            return
        first, *others = self._experts
        for expert in others:
            expert.load_state_dict(first.state_dict())
        self.together = False

    @property
    def first(self) -> nn.Module:
        """The expert that serves every item before the split; the first of those that this process holds."""
        return next(iter(self._experts))

    @property
    def _experts(self) -> nn.ModuleList:
        experts = self.mixture.experts
        assert isinstance(experts, ModuleExperts)
        return experts.experts

    def get_extra_state(self) -> Tensor:
        """Keep in the state dict whether the experts are still one; as a tensor, like all else that is in it."""
        return torch.tensor(self.together)

    def set_extra_state(self, state: Tensor | bool) -> None:
        """Take up where the state dict was saved; older ones hold a bool."""
        self.together = bool(state)


def begin_epoch(model: nn.Module, epoch: int) -> None:
    """Tell every part of a model that changes with the epoch which one begins."""
    for module in model.modules():
        if isinstance(module, StartTogether):
            module.begin_epoch(epoch)


def together(model: nn.Module) -> Iterator[StartTogether]:
    """Yield the mixtures of a model whose experts still are one network."""
    return (module for module in model.modules() if isinstance(module, StartTogether) and module.together)


def serving_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of experts that still serve every item."""
    return [parameter for layer in together(model) for parameter in layer.first.parameters()]


def idle_parameters(model: nn.Module) -> set[nn.Parameter]:
    """Return the parameters of routers and experts that wait for the split."""
    found = {parameter for layer in together(model) for parameter in layer.mixture.parameters()}
    return found.difference(serving_parameters(model))


def restore_splits(model: nn.Module, state: dict[str, Any]) -> None:
    """Tell every `StartTogether` of a model whether it was one network still when a state dict was saved."""
    for name, module in model.named_modules():
        if isinstance(module, StartTogether):
            module.set_extra_state(state.get(f"{name}._extra_state" if name else "_extra_state", True))
