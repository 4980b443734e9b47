"""The layer: route, dispatch, experts, combine. With `soft`, the only file that sees all four nouns."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from gatewright.dispatch import Dispatcher, Dropless
from gatewright.experts import Experts
from gatewright.internals import has_hooks
from gatewright.layers.base import RoutedLayer
from gatewright.layers.checks import fitting_output_shape
from gatewright.losses import Coefficients
from gatewright.routers import Router
from gatewright.routing import Routing


class MoE(RoutedLayer):
    """A mixture of experts in place of a module: ``y = sum_i G(x)_i E_i(x)``.

    Eq. 1 of https://arxiv.org/abs/1701.06538, with any router, experts and dispatch.

    Leading dimensions are free, and so is the shape of an item: with ``item_shape=(84,)`` an input of ``(batch, 84)``
    or ``(batch, time, 84)`` is routed per vector, with ``item_shape=(3, 32, 32)`` whole images are.

    In training, add `gatewright.aux_loss(model)` to the loss: it holds the balance losses that keep experts alive. A
    step that forgets it fails in backward.

    Args:
        router: The router, which chooses the experts of each item.
        experts: The experts.
        item_shape: Shape of what is dispatched; an int stands for one dimension. By default ``(router.dim,)``.
        dispatcher: The way of tokens to the experts and back; by default `Dropless`. Evaluation drops nothing, whatever
            the dispatcher.
        losses: Coefficient per auxiliary loss, by its name in `gatewright.losses.LOSSES` or by a function of your own
            from `RoutingSums` to a scalar; by default the router's own (``router.default_losses``). An empty mapping
            turns them off.
        shared: A module applied to every item, dropped or not, and added with weight 1. Several shared experts are one
            wider module: https://arxiv.org/abs/2401.06066 section 3.2.

    Raises:
        ValueError: If router, experts or dispatcher are something else; router and experts disagree on their number;
            experts do not take the items or return different shapes; the shared expert does not fit them, or a loss is
            unknown.
    """

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        item_shape: int | Sequence[int] | None = None,
        dispatcher: Dispatcher | None = None,
        losses: Coefficients | None = None,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__(router, losses, item_shape)
        self.output_shape = fitting_output_shape(router.num_experts, self.item_shape, experts, shared)
        self.experts, self.shared = experts, shared
        self.dispatcher = Dropless() if dispatcher is None else dispatcher
        if not isinstance(self.dispatcher, Dispatcher):
            raise ValueError(
                f"A dispatcher is a gatewright.Dispatcher; got {dispatcher!r}. Leave it out, or pass Capacity()."
            )
        self.watch()

    def mix(
        self, items: Float[Tensor, "tokens *item"], routed: Routing
    ) -> tuple[Float[Tensor, "tokens *out"], Routing]:
        """Send each item to its experts and add up what they return: all at once where that can be, or row by row."""
        return self._forward_routed(items, routed) or self._forward_rows(items, routed)

    def _forward_routed(self, items: Tensor, routing: Routing) -> tuple[Tensor, Routing] | None:
        """Let the experts go the whole way, unless somebody is to see their rows: other processes, hooks, a wrapper."""
        seen = has_hooks(self.experts) or not isinstance(self.experts, Experts)
        if seen or not self.dispatcher.keeps_all(training=self.training):
            return None
        routed = self.experts.forward_routed(items, routing)
        if routed is None or self.shared is None:
            return routed
        return routed[0] + self.shared(items), routed[1]

    def _forward_rows(self, items: Tensor, routing: Routing) -> tuple[Tensor, Routing]:
        """Dispatch, experts, combine: what the fused way computes too."""
        batch = self.dispatcher.dispatch(items, routing, training=self.training)
        beside = None if self.shared is None else self.shared(items)  # while the rows travel
        batch = self.dispatcher.arrive(batch)
        rows = self.experts(batch.rows, batch.tokens_per_expert)
        output = self.dispatcher.combine(rows, batch, items.shape[0])
        return output if beside is None else output + beside, batch.routing

    def extra_repr(self) -> str:
        """Show the dispatcher and the losses when a model is printed."""
        return f"dispatcher={self.dispatcher}, {super().extra_repr()}"
