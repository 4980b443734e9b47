"""The layer: route, dispatch, experts, combine. The only file that sees all four nouns."""

import weakref
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.dispatch import Dispatcher, Dropless
from gatewright.experts import Experts
from gatewright.losses import LOSSES
from gatewright.names import known
from gatewright.routers import Router
from gatewright.routing import Routing, RoutingSums

REENTRANT = (
    "MoE layer ran in training without gradients, so its auxiliary losses are lost: either under torch.no_grad(), or "
    "under reentrant activation checkpointing, which Gatewright refuses because the losses would never reach the "
    "optimizer. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
)


class MoE(nn.Module):
    """A mixture of experts in place of a module: ``y = sum_i G(x)_i E_i(x)``.

    Eq. 1 of https://arxiv.org/abs/1701.06538, with any router, experts and dispatch.

    Leading dimensions are free, and so is the shape of an item: with ``item_shape=(84,)`` an input of ``(batch, 84)``
    or ``(batch, time, 84)`` is routed per vector, with ``item_shape=(3, 32, 32)`` whole images are.

    In training, add `gatewright.aux_loss(model)` to the loss: it holds the balance losses that keep experts alive. A
    step that forgets it fails in backward.

    Args:
        router: Who goes where.
        experts: What they do there.
        item_shape: Shape of what is dispatched; an int stands for one dimension. By default ``(router.dim,)``.
        dispatcher: How tokens travel; by default `Dropless`. Evaluation drops nothing, whatever the dispatcher.
        losses: Coefficient per auxiliary loss, by its name in `gatewright.losses.LOSSES`; by default the router's own
            (``router.default_losses``). An empty mapping turns them off.

    Raises:
        ValueError: If router and experts disagree on their number, experts do not take the items or return different
            shapes, or a loss is unknown.
    """

    routing: Routing | None
    """The last forward's routing without its graph, grouped by expert and with what was dropped; a view for metrics."""

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        item_shape: int | Sequence[int] | None = None,
        dispatcher: Dispatcher | None = None,
        losses: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__()
        if router.num_experts != experts.num_experts:
            raise ValueError(
                f"The router chooses among {router.num_experts} experts and there are {experts.num_experts}. "
                "Give both the same num_experts."
            )
        self.router, self.experts, self.dispatcher = router, experts, dispatcher or Dropless()
        self.losses = dict(router.default_losses if losses is None else losses)
        for name in self.losses:
            known(name, LOSSES, "auxiliary loss")
        shape = (router.dim,) if item_shape is None else item_shape
        self.item_shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.output_shape = experts.output_shape(self.item_shape)
        self.routing = None
        self.loss_values: dict[str, Tensor] = {}
        self._pending: list[RoutingSums] = []
        self._lost = False
        self._watch()

    def forward(
        self, x: Float[Tensor, "*batch_and_item"], features: Float[Tensor, "*batch_and_features"] | None = None
    ) -> Float[Tensor, "*batch_and_out"]:
        """Send each item to its experts and add up what they return.

        Args:
            x: Items, ``(*batch, *item_shape)``.
            features: What the router looks at, ``(*batch, ...)`` with ``router.dim`` numbers per item; by default the
                items themselves, flattened.

        Raises:
            ValueError: If a shape or dtype does not fit.
        """
        items = self._items(x)
        routing = self.router(self._features(items if features is None else features, len(items)))
        batch = self.dispatcher.dispatch(items, routing, training=self.training)
        rows = self.experts(batch.rows, batch.tokens_per_expert)
        output = self.dispatcher.combine(rows, batch, len(items))
        self._record(batch.routing)
        return output.reshape(*x.shape[: x.dim() - len(self.item_shape)], *self.output_shape)

    def take_losses(self) -> dict[str, Tensor]:
        """Return each auxiliary loss, unweighted, of the training forwards since the last call, and forget them."""
        pending, self._pending = self._pending, []
        if not pending and self.training and self._lost:
            raise RuntimeError(REENTRANT)
        losses = {name: sum((LOSSES[name](sums) for sums in pending), torch.zeros(())) for name in self.losses}
        self.loss_values = {name: loss.detach() for name, loss in losses.items()}
        return losses

    def _items(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(f"MoE takes floating-point items; got {x.dtype}. Convert with x.float() first.")
        if x.dim() <= len(self.item_shape) or tuple(x.shape[-len(self.item_shape) :]) != self.item_shape:
            raise ValueError(
                f"MoE takes items of shape {self.item_shape} behind one or more batch dimensions; got "
                f"{tuple(x.shape)}. Reshape the input, or set item_shape."
            )
        return x.reshape(-1, *self.item_shape)

    def _features(self, features: Tensor, num_tokens: int) -> Tensor:
        if features.numel() != num_tokens * self.router.dim:
            raise ValueError(
                f"The router looks at {self.router.dim} numbers per item, for {num_tokens} items; got features of "
                f"shape {tuple(features.shape)}. Make router.dim and the features agree."
            )
        return features.reshape(num_tokens, self.router.dim)

    def _record(self, routing: Routing) -> None:
        """Keep what losses and metrics read; a forward that runs again inside backward records nothing."""
        if not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            if self.training and self._lost:
                raise RuntimeError(REENTRANT)
            return
        self.routing = routing.detach()
        if self.training and self.losses:
            self._lost = not torch.is_grad_enabled()
            if not self._lost:
                self._pending.append(routing.sums)

    def _watch(self) -> None:
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
        self._watch()

    def extra_repr(self) -> str:
        """Show the dispatcher and the losses when a model is printed."""
        return f"dispatcher={self.dispatcher}, losses={self.losses}"


def moe_layers(model: nn.Module) -> Iterator[tuple[str, MoE]]:
    """Yield the name and the layer of every `MoE` in a model, the model itself included."""
    return ((name, module) for name, module in model.named_modules() if isinstance(module, MoE))


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


def _refuse_untaken_losses(layer: "weakref.ref[MoE]", gradient: Tensor) -> None:
    moe = layer()
    if moe is not None and moe._pending:
        raise RuntimeError(
            "backward ran before this MoE layer's auxiliary loss was taken, so its experts would go unbalanced. Add it "
            "to the loss: loss = task_loss + gatewright.aux_loss(model). To train without, pass losses={} to MoE."
        )
