"""What every layer with a router keeps beside its output: the last routing, and losses waiting to be taken."""

import math
import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.experts.base import Shape
from gatewright.losses import LOSSES
from gatewright.names import known
from gatewright.routers import Router
from gatewright.routing import Routing, RoutingSums, SoftRouting
from gatewright.scope import BatchScope, noise_key

REENTRANT = (
    "MoE layer ran in training without gradients, so its auxiliary losses are lost: either under torch.no_grad(), or "
    "under reentrant activation checkpointing, which Gatewright refuses because the losses would never reach the "
    "optimizer. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
)


class RoutedLayer(nn.Module):
    """A layer with a router: its auxiliary losses, its last routing and its place in a global batch.

    Args:
        router: Who goes where.
        losses: Coefficient per auxiliary loss; None takes the router's own.
        item_shape: Shape of one item; an int stands for one dimension, None for ``(router.dim,)``.

    Raises:
        ValueError: If a loss is unknown, or its coefficient not finite.
    """

    item_shape: Shape
    """Shape of one item."""
    output_shape: Shape
    """Shape of what becomes of one item, known once the layer has its experts."""

    routing: Routing | SoftRouting | None
    """The last forward's routing without its graph, grouped by expert and with what was dropped; a view for metrics."""

    def __init__(
        self, router: Router, losses: Mapping[str, float] | None, item_shape: int | Sequence[int] | None = None
    ) -> None:
        super().__init__()
        self.router = router
        shape = (router.dim,) if item_shape is None else item_shape
        self.item_shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.losses = dict(router.default_losses if losses is None else losses)
        for name, coefficient in self.losses.items():
            known(name, LOSSES, "auxiliary loss")
            if not math.isfinite(coefficient):
                raise ValueError(f"The coefficient of an auxiliary loss is finite; got {coefficient} for {name}.")
        self.scope, self.local_balance = BatchScope(), False
        self.routing = None
        self.loss_values: dict[str, Tensor] = {}
        self._pending: list[RoutingSums] = []
        self._lost = False

    def take_losses(self) -> dict[str, Tensor]:
        """Return each auxiliary loss, unweighted, of the training forwards since the last call, and forget them."""
        pending, self._pending = self._pending, []
        if not pending and self.training and self._lost:
            raise RuntimeError(REENTRANT)
        batches = pending if self.local_balance else [sums.over(self.scope) for sums in pending]
        losses = {name: sum((LOSSES[name](sums) for sums in batches), torch.zeros(())) for name in self.losses}
        self.loss_values = {name: loss.detach() for name, loss in losses.items()}
        return losses

    def check_num_experts(self, num_experts: int) -> None:
        """Refuse experts that the router does not choose among.

        Raises:
            ValueError: If there are not as many as the router chooses among.
        """
        if self.router.num_experts != num_experts:
            raise ValueError(
                f"The router chooses among {self.router.num_experts} experts and there are {num_experts}. "
                "Give both the same num_experts."
            )

    def flat_items(self, x: Tensor) -> Float[Tensor, "tokens *item"]:
        """Merge the leading dimensions into one.

        Raises:
            ValueError: If these are not floating-point items of ``item_shape``.
        """
        if not x.is_floating_point():
            raise ValueError(
                f"{type(self).__name__} takes floating-point items; got {x.dtype}. Convert with x.float() first."
            )
        if x.dim() <= len(self.item_shape) or tuple(x.shape[x.dim() - len(self.item_shape) :]) != self.item_shape:
            raise ValueError(
                f"{type(self).__name__} takes items of shape {self.item_shape} behind one or more batch dimensions; "
                f"got {tuple(x.shape)}. Reshape the input, or set item_shape."
            )
        return x.reshape(-1, *self.item_shape)

    def batch_shape(self, x: Tensor) -> torch.Size:
        """Return the dimensions of an input in front of an item's."""
        return x.shape[: x.dim() - len(self.item_shape)]

    def like_batch(self, output: Float[Tensor, "tokens *out"], x: Tensor) -> Float[Tensor, "*batch_and_out"]:
        """Give outputs the leading dimensions of the input."""
        return output.reshape(*self.batch_shape(x), *self.output_shape)

    def route_features(self, features: Tensor, batch: Sequence[int]) -> Routing | SoftRouting:
        """Route items by features of any trailing shape behind the items' batch dimensions.

        Raises:
            ValueError: If there are not ``router.dim`` numbers per item.
        """
        num_tokens = math.prod(batch)
        if tuple(features.shape[: len(batch)]) != tuple(batch) or features.numel() != num_tokens * self.router.dim:
            raise ValueError(
                f"The router looks at {self.router.dim} numbers per item, for {num_tokens} items; got features of "
                f"shape {tuple(features.shape)}. Make router.dim and the features agree."
            )
        routing: Routing | SoftRouting = self.router(features.reshape(num_tokens, self.router.dim), self.scope)
        return routing

    def record(self, routing: Routing | SoftRouting) -> None:
        """Keep what losses and metrics read; a forward that runs again inside backward records nothing."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            if self.training and self._lost:
                raise RuntimeError(REENTRANT)
            return
        self.routing = routing.detach()
        if self.training:
            self.router.record(self.routing.sums)
        if self.training and self.losses:
            self._lost = not torch.is_grad_enabled()
            if not self._lost:
                self._pending.append(routing.sums)

    def watch(self) -> None:
        """See to it that a gradient which arrives before the losses were taken is an error."""
        check = partial(_refuse_untaken_losses, weakref.ref(self))
        for parameter in self.parameters():
            if parameter.requires_grad:
                parameter.register_hook(check)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last batch out of copies and pickles."""
        return {**self.__dict__, "routing": None, "loss_values": {}, "_pending": [], "_lost": False}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Watch the copy's parameters as the original's are watched."""
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        self.watch()


def moe_layers(model: nn.Module) -> Iterator[tuple[str, RoutedLayer]]:
    """Yield the name and the layer of everything with a router in a model, the model itself included."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, RoutedLayer))


def aux_loss(model: nn.Module) -> Float[Tensor, ""]:
    """Add up coefficient times auxiliary loss over every MoE layer of a model, for one backward.

    Call it once per training forward and add it to the loss: ``loss = task_loss + gatewright.aux_loss(model)``. In
    evaluation it is zero. With gradient accumulation it is per micro-batch, like the task loss.

    Raises:
        ValueError: If the model has no MoE layer.
        RuntimeError: If a layer ran in training without gradients.
    """
    layers = [layer for _, layer in moe_layers(model)]
    if not layers:
        raise ValueError("aux_loss found no MoE layer in this model; pass the model that contains them.")
    taken = [(layer.losses[name], loss) for layer in layers for name, loss in layer.take_losses().items()]
    return sum((coefficient * loss for coefficient, loss in taken), torch.zeros(()))


def end_step(model: nn.Module) -> None:
    """Let routers adapt to what they routed since the last optimizer step; call it after ``optimizer.step()``.

    Loss-free balancing (`gatewright.Biased`) needs it: once per optimizer step, however many micro-batches and forwards
    that took. Other routers ignore it.
    """
    for _, layer in moe_layers(model):
        layer.router.end_step(layer.scope)


def seed_noise(model: nn.Module, seed: int, step: int) -> None:
    """Make the routers' noise a function of a seed, a step, the layer's place and the token's global number.

    It then does not depend on how a batch is split over processes, nor on what else draws random numbers; micro-batches
    are batches of their own. Call it before every forward with another ``step``: the same numbers give the same noise.
    Without it noise comes from torch's generator.
    """
    for place, (_, layer) in enumerate(moe_layers(model)):
        key = noise_key(seed, step, place)
        if layer.scope.key is None:
            layer.scope.key = torch.tensor(key)
        else:
            layer.scope.key.fill_(key)


def _refuse_untaken_losses(layer: "weakref.ref[RoutedLayer]", gradient: Tensor) -> None:
    moe = layer()
    if moe is not None and moe._pending:
        moe._pending.clear()  # They belong to the step that fails here; the next one is not to take them too.
        raise RuntimeError(
            "backward ran before this MoE layer's auxiliary loss was taken, so its experts would go unbalanced. Add it "
            "to the loss: loss = task_loss + gatewright.aux_loss(model). To train without, pass losses={} to MoE."
        )
