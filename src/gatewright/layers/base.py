"""What every layer with a router keeps beside its output: the last routing, and losses waiting to be taken."""

import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gatewright.experts.base import Shape
from gatewright.internals import (
    backward_id,
    in_transform,
    is_exporting,
    mend_inductor,
    outside_transforms,
    without_transforms,
)
from gatewright.layers.checks import NO_WEIGHT, check_items, check_router
from gatewright.layers.untaken import REENTRANT, Mark, Untaken, refuse_untaken
from gatewright.losses import Coefficients, by_name
from gatewright.reset import reset_parts
from gatewright.routers import Router, Soft
from gatewright.routing import Routing, real_only
from gatewright.routing_sums import RoutingSums
from gatewright.scope import BatchScope, Mask, noise_key


class RoutedLayer(nn.Module):
    """A layer with a router: its auxiliary losses, its last routing and its place in a global batch.

    Args:
        router: The router, which chooses the experts of each item.
        losses: Coefficient per auxiliary loss, by its name in `gatewright.losses.LOSSES` or by a function of your own
            from `RoutingSums` to a scalar; None takes the router's own.
        item_shape: Shape of one item; an int stands for one dimension, None for ``(router.dim,)``.

    Raises:
        ValueError: If the router is of another kind, a loss is unknown, or its coefficient not finite.
    """

    router_kind: ClassVar[type[nn.Module]] = Router
    """What its router is."""
    item_shape: Shape
    """Shape of one item."""
    output_shape: Shape
    """Shape of what becomes of one item, known once the layer has its experts."""

    routing: Routing | None
    """The last forward's routing without its graph, grouped by expert and with what was dropped; a view for metrics."""

    def __init__(
        self, router: Router | Soft, losses: Coefficients | None, item_shape: int | Sequence[int] | None = None
    ) -> None:
        super().__init__()
        check_router(router, self.router_kind, type(self).__name__)
        self.router = router
        shape = (router.dim,) if item_shape is None else item_shape
        self.item_shape = (shape,) if isinstance(shape, int) else tuple(shape)
        coefficients = router.default_losses if losses is None else losses
        self._loss_functions, self.losses = by_name(coefficients, router.own_losses)
        self.scope, self.local_balance = BatchScope(), False
        self.routing = None
        self.loss_values: dict[str, Tensor] = {}
        self._untaken: list[Untaken] = []
        self._lost = False
        self._watching: list[RemovableHandle] = []

    def forward(
        self,
        x: Float[Tensor, "*batch_and_item"],
        features: Num[Tensor, "*batch_and_features"] | None = None,
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch_and_out"]:
        """Route each item, and return what its experts make of it.

        Args:
            x: Items, ``(*batch, *item_shape)``.
            features: Features that the router looks at, ``(*batch, ...)`` with ``router.dim`` numbers per item; by
                default the items themselves, flattened.
            mask: ``(*batch,)``, True where an item is real; the opposite of torch's ``key_padding_mask``. The others,
                such as padding, are not routed and not counted, take no capacity and draw no noise, and their outputs
                are zeros: the real ones get what they would get without them. In `SoftMoE` they have no part in any
                slot, but count as members of their group. A shared expert is called on zeros in their place.

        Raises:
            ValueError: If a shape or dtype does not fit, or in `SoftMoE` the number of items is not a multiple of the
                group size.
        """
        if torch.compiler.is_compiling():
            mend_inductor()
        items = self.flat_items(x, mask)
        output, routing = self.mix(items, self.route(x, features, mask))
        output = self.like_batch(output, x, mask)
        self.record(routing, output)
        return output

    def mix(self, items: Float[Tensor, "tokens *item"], routed: Any) -> tuple[Float[Tensor, "tokens *out"], Routing]:
        """Return the outputs of flat items, and the routing to keep; each layer has its own way.

        Args:
            items: The items, with zeros in place of masked ones.
            routed: What the router returned for them.
        """
        raise NotImplementedError

    def take_losses(self) -> dict[str, Tensor]:
        """Return each auxiliary loss, unweighted, of the training forwards since the last call, and forget them."""
        untaken, self._untaken = [each.sums for each in self._untaken if not each.is_spent()], []
        if not untaken and self.training and self._lost:
            raise RuntimeError(REENTRANT)
        batches = untaken if self.local_balance else [sums.over(self.scope) for sums in untaken]
        functions = {name: self._loss_functions[name] for name in self.losses}
        losses = {
            name: sum(map(loss, batches), torch.zeros((), dtype=torch.float32)) for name, loss in functions.items()
        }
        self.loss_values = {name: loss.detach() for name, loss in losses.items()}
        return losses

    def reset_parameters(self) -> None:
        """Initialise router, experts and a shared expert as construction does, in that order.

        For a model made without memory: under ``torch.device("meta")``, then ``model.to_empty(device=...)``. Modules of
        your own do their part in a ``reset_parameters`` of their own, as torch's layers do.

        Raises:
            ValueError: If a tensor belongs to a module without that method.
        """
        reset_parts(self)

    def flat_items(self, x: Tensor, mask: Tensor | None = None) -> Float[Tensor, "tokens *item"]:
        """Merge the leading dimensions into one, with zeros in place of masked items.

        Raises:
            ValueError: If these are not floating-point items of ``item_shape``, or the mask is not theirs.
            RuntimeError: If the layer is traced by `torch.jit.trace`.
        """
        check_items(x, mask, self.item_shape, type(self).__name__)
        return real_only(x.reshape(-1, *self.item_shape), flat(mask))

    def batch_shape(self, x: Tensor) -> torch.Size:
        """Return the dimensions of an input in front of an item's."""
        return x.shape[: x.dim() - len(self.item_shape)]

    def like_batch(
        self, output: Float[Tensor, "tokens *out"], x: Tensor, mask: Tensor | None = None
    ) -> Float[Tensor, "*batch_and_out"]:
        """Give outputs the leading dimensions of the input, and masked items zeros."""
        return real_only(output, flat(mask)).reshape(*self.batch_shape(x), *self.output_shape)

    def route(self, x: Tensor, features: Tensor | None = None, mask: Tensor | None = None) -> Any:
        """Return what the router makes of items, or of features of any shape behind their batch dimensions.

        Raises:
            ValueError: If there are not ``router.dim`` numbers per item.
        """
        features, batch, dim = x if features is None else features, self.batch_shape(x), self.router.dim
        num_tokens = math.prod(batch)
        if features.shape[: len(batch)] != batch or features.numel() != num_tokens * dim:
            raise ValueError(
                f"The router looks at {dim} numbers per item, for {num_tokens} items; got features of shape "
                f"{tuple(features.shape)}. Make router.dim and the features agree."
            )
        features = real_only(features.reshape(num_tokens, dim), flat(mask))
        return self.router(features, self.scope) if mask is None else self.router(features, self.scope, flat(mask))

    def record(self, routing: Routing, output: Tensor) -> None:
        """Keep what losses and metrics read; a forward that runs again inside backward records nothing.

        Args:
            routing: The routing of this forward.
            output: The output of the layer.
        """
        if is_exporting():
            return
        if not torch.compiler.is_compiling() and backward_id() != -1:
            if self.training and self._lost:
                raise RuntimeError(REENTRANT)
            return
        if in_transform():  # Its tensors are of no use after it, so no routing is kept.
            self.routing, sums = None, routing.sums.map(without_transforms)
            with outside_transforms():
                self._note_training(sums.detach())
        else:
            self.routing = routing.detach()
            self._note_training(self.routing.sums)
        if self.training and self.losses:
            self._lost = not torch.is_grad_enabled()
            if not self._lost:
                self._wait_for_losses(routing.sums, output)

    def _note_training(self, sums: RoutingSums) -> None:
        """Let the router take note of a training forward, and go on to the next one's noise."""
        if self.training:
            self.router.record(sums)
            self.scope.next_forward()

    def _wait_for_losses(self, sums: RoutingSums, output: Tensor) -> None:
        """Keep the sums until their losses are taken, or no backward pass can come to them any more."""
        compiling = torch.compiler.is_compiling()
        mark = None if compiling or in_transform() else Mark(output)
        # Nothing marks a compiled output, and the losses of a frozen layer may wait for ever: it keeps the last ones.
        forgetful = compiling and not any(parameter.requires_grad for parameter in self.parameters())
        waiting = [] if forgetful else [each for each in self._untaken if not each.is_abandoned()]
        self._untaken = [*waiting, Untaken(sums, mark)]

    def watch(self) -> None:
        """See to it that a gradient which arrives before the losses were taken is an error."""
        for handle in self._watching:
            handle.remove()
        check = partial(refuse_untaken, weakref.ref(self))
        self._watching = [each.register_hook(check) for each in self.parameters() if each.requires_grad]

    def train(self, mode: bool = True) -> Self:
        """Watch what is trained now, such as adapters that were added since."""
        super().train(mode)
        self.watch()
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Watch the parameters that take the place of these, as when a model leaves the meta device."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.watch()
        return self

    def extra_repr(self) -> str:
        """Show the losses when a model is printed."""
        return f"losses={self.losses}"

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last batch out of copies and pickles."""
        return {**self.__dict__, "routing": None, "loss_values": {}, "_untaken": [], "_watching": [], "_lost": False}

    def __getattr__(self, name: str) -> Any:
        """Say where the weights are to whoever takes the layer for an `nn.Linear`."""
        if name in ("weight", "bias"):
            raise AttributeError(NO_WEIGHT.format(name=type(self).__name__, attribute=name))
        return super().__getattr__(name)

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
    return sum((coefficient * loss for coefficient, loss in taken), torch.zeros((), dtype=torch.float32))


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
    A layer that is called several times in one forward draws other noise each time. Activation checkpointing finds the
    noise of the forward that it runs again. Without this call noise comes from torch's generator.
    """
    for place, (_, layer) in enumerate(moe_layers(model)):
        layer.scope.set_key(noise_key(seed, step, place))


def flat(mask: Tensor | None) -> Mask:
    """Merge the dimensions of a mask into one."""
    return None if mask is None else mask.reshape(-1)
