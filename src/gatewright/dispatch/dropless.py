"""Dropless dispatch: every assignment reaches its expert, however uneven the load."""

from jaxtyping import Float
from torch import Tensor

from gatewright.dispatch.base import Dispatcher, ExpertBatch, group_by_expert
from gatewright.routing import Routing


class Dropless(Dispatcher):
    """Group rows by expert and drop none, as MegaBlocks does: https://arxiv.org/abs/2211.15841."""

    def dispatch(self, x: Float[Tensor, "tokens *item"], routing: Routing, *, training: bool) -> ExpertBatch:
        """Gather one row per assignment, grouped by expert; the same in training and evaluation."""
        return group_by_expert(x, routing)

    def keeps_all(self, *, training: bool) -> bool:
        """Nothing is ever dropped."""
        return True

    def __repr__(self) -> str:
        """Show the dispatcher when a layer is printed."""
        return "Dropless()"
