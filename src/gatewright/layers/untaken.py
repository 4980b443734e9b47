"""Auxiliary losses that nobody has taken yet, and whether a backward pass can still come to them."""

import weakref
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from gatewright.internals import backward_id, backward_keeps_graph, outlived_transform
from gatewright.routing_sums import RoutingSums

REENTRANT = (
    "MoE layer ran in training without gradients, so its auxiliary losses are lost: either under torch.no_grad(), or "
    "under reentrant activation checkpointing, which Gatewright refuses because the losses would never reach the "
    "optimizer. Pass use_reentrant=False to torch.utils.checkpoint.checkpoint."
)


class Mark:
    """What is known of one forward's output: which backward pass came to it, and whether anybody holds on to it.

    Args:
        output: The output of the layer.
    """

    def __init__(self, output: Tensor) -> None:
        self.reached_by, self.is_over = -1, False
        hook = partial(self._note)  # The graph holds on to it, and nothing else does.
        if output.requires_grad:
            output.register_hook(hook)
        self._hook = weakref.ref(hook)

    @property
    def is_held(self) -> bool:
        """Whether the output's graph is still there; it never is where there is none."""
        return self._hook() is not None

    @property
    def is_being_differentiated(self) -> bool:
        """Whether the backward pass that runs now came through the output, or one did whose graph it goes on with."""
        return self.reached_by == backward_id() or (self.reached_by != -1 and not self.is_over)

    def _note(self, gradient: Tensor) -> None:
        self.reached_by, self.is_over = backward_id(), not backward_keeps_graph()


@dataclass(frozen=True)
class Untaken:
    """Sums of a training forward whose losses nobody has taken yet.

    Args:
        sums: The sums over its batch.
        mark: The mark on its output; None of a compiled forward and of one in a transform of `torch.func`, which leave
            none.
    """

    sums: RoutingSums
    mark: Mark | None

    def is_spent(self) -> bool:
        """Whether there is nothing left to differentiate: the graph was freed, or the transform has returned."""
        return outlived_transform(self.sums.probs) or (self.mark is not None and self.mark.is_over)

    def is_abandoned(self) -> bool:
        """Whether no backward pass can come to them: they are spent, or nobody holds on to the output."""
        return self.is_spent() or (self.mark is not None and not self.mark.is_held)

    def is_forgotten(self) -> bool:
        """Whether these losses wait while a backward pass comes through the output."""
        return self.mark is None or self.mark.is_being_differentiated


def refuse_untaken(layer: weakref.ref[Any], gradient: Tensor) -> None:
    """Raise where the gradient of a layer's parameter arrives before the layer's losses were taken."""
    moe = layer()
    if moe is not None and any(each.is_forgotten() for each in moe._untaken):
        moe._untaken.clear()  # They belong to the step that fails here; the next one is not to take them too.
        raise RuntimeError(
            "backward ran before this MoE layer's auxiliary loss was taken, so its experts would go unbalanced. Add it "
            "to the loss: loss = task_loss + gatewright.aux_loss(model). To train without, pass losses={} to MoE."
        )
