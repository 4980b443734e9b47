"""Soft mixture: experts run on slots, which are weighted means of tokens."""

from collections.abc import Sequence

from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from gatewright.dispatch import Dispatcher, Dropless
from gatewright.experts import Experts
from gatewright.layers.base import RoutedLayer
from gatewright.losses import Coefficients
from gatewright.routers import Soft
from gatewright.routers.soft import SlotWeights


class SoftMoE(RoutedLayer):
    """Experts that run on mixtures of items: ``Y = C f(D^T X)``, https://arxiv.org/abs/2308.00951.

    Every slot of an expert holds a weighted mean of all items of a group, and every item gets a weighted mean of all
    slots' outputs (eqs. 1 and 2). Nothing is dropped, and training and evaluation are alike. The slots travel to their
    experts as items do in `MoE`, so that experts may be spread over processes. `routing` lists every item for every
    expert, by its share of it.

    Args:
        router: The weights D and C, and what a group is.
        experts: What is done with the slots.
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
        self.experts, self.shared, self.output_shape = experts, shared, self.fit(experts, shared)
        self.dispatcher: Dispatcher = Dropless()
        self.watch()

    def forward(
        self,
        x: Float[Tensor, "*batch_and_item"],
        features: Num[Tensor, "*batch_and_features"] | None = None,
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch_and_out"]:
        """Fill the slots, run the experts on them, and mix what they return.

        Args:
            x: Items, ``(*batch, *item_shape)``.
            features: What the router looks at, as in `MoE`.
            mask: Which items are real, as in `MoE`. The others have no part in any slot; groups are counted with them.

        Raises:
            ValueError: If a shape or dtype does not fit, or the number of items is not a multiple of the group size.
        """
        items = self.flat_items(x, mask)
        weights: SlotWeights = self.route(x, features, mask)
        slots = weights.fill(items)
        batch = self.dispatcher.dispatch(slots, weights.of_slots(), training=self.training)
        beside = None if self.shared is None else self.shared(items)  # while the slots travel
        batch = self.dispatcher.arrive(batch)
        rows = self.experts(batch.rows, batch.tokens_per_expert)
        output = weights.spread(self.dispatcher.combine(rows, batch, slots.shape[0]))
        if beside is not None:
            output = output + beside
        output = self.like_batch(output, x, mask)
        self.record(weights.routing, output)
        return output
