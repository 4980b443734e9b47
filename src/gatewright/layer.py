"""The layer: route, dispatch, experts, combine. The only file that sees all four nouns."""

from collections.abc import Mapping, Sequence

from jaxtyping import Float
from torch import Tensor

from gatewright.dispatch import Dispatcher, Dropless
from gatewright.experts import Experts
from gatewright.routed import RoutedLayer
from gatewright.routers import Router


class MoE(RoutedLayer):
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

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        item_shape: int | Sequence[int] | None = None,
        dispatcher: Dispatcher | None = None,
        losses: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(router, losses)
        if router.num_experts != experts.num_experts:
            raise ValueError(
                f"The router chooses among {router.num_experts} experts and there are {experts.num_experts}. "
                "Give both the same num_experts."
            )
        self.experts, self.dispatcher = experts, dispatcher or Dropless()
        shape = (router.dim,) if item_shape is None else item_shape
        self.item_shape = (shape,) if isinstance(shape, int) else tuple(shape)
        self.output_shape = experts.output_shape(self.item_shape)
        self.watch()

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
        routing = self.route_features(items if features is None else features, len(items))
        batch = self.dispatcher.dispatch(items, routing, training=self.training)
        rows = self.experts(batch.rows, batch.tokens_per_expert)
        output = self.dispatcher.combine(rows, batch, len(items))
        self.record(batch.routing)
        return output.reshape(*x.shape[: x.dim() - len(self.item_shape)], *self.output_shape)

    def _items(self, x: Tensor) -> Tensor:
        if not x.is_floating_point():
            raise ValueError(f"MoE takes floating-point items; got {x.dtype}. Convert with x.float() first.")
        if x.dim() <= len(self.item_shape) or tuple(x.shape[-len(self.item_shape) :]) != self.item_shape:
            raise ValueError(
                f"MoE takes items of shape {self.item_shape} behind one or more batch dimensions; got "
                f"{tuple(x.shape)}. Reshape the input, or set item_shape."
            )
        return x.reshape(-1, *self.item_shape)

    def extra_repr(self) -> str:
        """Show the dispatcher and the losses when a model is printed."""
        return f"dispatcher={self.dispatcher}, losses={self.losses}"
