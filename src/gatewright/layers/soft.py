"""Soft mixture: experts run on slots, which are weighted means of tokens."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn

from gatewright.dispatch import Dispatcher, Dropless
from gatewright.experts import Experts
from gatewright.layers.base import RoutedLayer
from gatewright.layers.checks import fitting_output_shape
from gatewright.losses import Coefficients
from gatewright.routers import Soft
from gatewright.routers.soft import SlotWeights
from gatewright.routing import Routing


class SoftMoE(RoutedLayer):
    """Experts that run on mixtures of items: ``Y = C f(D^T X)``, https://arxiv.org/abs/2308.00951.

    Every slot of an expert holds a weighted mean of all items of a group, and every item gets a weighted mean of all
    slots' outputs (eqs. 1 and 2). Nothing is dropped, and training and evaluation are alike. The slots travel to their
    experts as items do in `MoE`, so that experts may be spread over processes. `routing` lists every item for every
    expert, by its share of it.

    Args:
        router: The router, which makes the weights D and C of each group.
        experts: The experts, which run on the slots.
        item_shape: Shape of one item; an int stands for one dimension. By default ``(router.dim,)``.
        losses: Coefficient per auxiliary loss, as in `MoE`; by default none, since no expert can starve.
        shared: A module applied to every item and added with weight 1.

    Raises:
        ValueError: If the router is not a `Soft`, or the rest does not fit, as in `MoE`.
    """

    router_kind = Soft

    def __init__(
        self,
        router: Soft,
        experts: Experts,
        *,
        item_shape: int | Sequence[int] | None = None,
        losses: Coefficients | None = None,
        shared: nn.Module | None = None,
    ) -> None:
        super().__init__(router, losses, item_shape)
        self.output_shape = fitting_output_shape(router.num_experts, self.item_shape, experts, shared)
        self.experts, self.shared = experts, shared
        self.dispatcher: Dispatcher = Dropless()
        self.watch()

    def mix(
        self, items: Float[Tensor, "tokens *item"], routed: SlotWeights
    ) -> tuple[Float[Tensor, "tokens *out"], Routing]:
        """Fill the slots, run the experts on them, and mix what they return."""
        slots = routed.fill(items)
        batch = self.dispatcher.dispatch(slots, routed.of_slots(), training=self.training)
        beside = None if self.shared is None else self.shared(items)  # while the slots travel
        batch = self.dispatcher.arrive(batch)
        rows = self.experts(batch.rows, batch.tokens_per_expert)
        output = routed.spread(self.dispatcher.combine(rows, batch, slots.shape[0]))
        return output if beside is None else output + beside, routed.routing
