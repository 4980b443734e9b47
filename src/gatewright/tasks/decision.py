"""What may become of a setting that is changed when a run goes on.

A setting that is ``EXACT`` has no part in the numbers, and may change in silence. With ``ROUNDING`` the computation is
the same, in another order or place, so that last digits may differ. ``FROM_HERE`` holds for the steps that are still to
come. A refusal says why: the run would no longer be the one that its result names.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from gatewright.models import MixtureConfig


@dataclass(frozen=True)
class Decision:
    """Whether a setting may change in a run that is resumed.

    Args:
        kind: What becomes of the run.
        why: The reason for a refusal.
    """

    kind: Literal["exact", "rounding", "from here", "refused"]
    why: str = ""


@dataclass(frozen=True)
class Change:
    """A setting that is not what it was.

    Args:
        before: The setting's value in the steps so far.
        now: The setting's value from here on.
        epoch: Epochs that are complete.
        step: Optimizer steps made in the next one.
        model: The settings of the model from here on.
    """

    before: Any
    now: Any
    epoch: int
    step: int
    model: MixtureConfig


Rule = Decision | Callable[[Change], Decision]
"""The decision on a setting, or how the decision follows from the change."""

EXACT, ROUNDING, FROM_HERE = Decision("exact"), Decision("rounding"), Decision("from here")


def refused(why: str) -> Decision:
    """Refuse any change."""
    return Decision("refused", why)
