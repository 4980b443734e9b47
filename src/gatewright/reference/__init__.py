"""The specification: a mixture of experts in plain loops. Read it first, beginning with `layers`.

Nothing here is fast and nothing is shared with the rest of the package; every router, dispatcher and kind of experts is
tested against it, outputs and gradients.
"""

from gatewright.reference.dispatch import (
    keep_within_capacity,
    prioritised,
)
from gatewright.reference.layers import (
    merged,
    mixture,
    of_real_items,
    residual,
    soft_mixture,
)
from gatewright.reference.losses import (
    cv_squared,
    hierarchical_load,
    threshold_loss,
)
from gatewright.reference.routers import (
    batchwise_mask,
    expert_choice,
    expert_dropout,
    gated,
    group_limited,
    hashed,
    hierarchical,
    load_probability,
    moved_bias,
    noisy_top_k,
    sinkhorn,
    soft,
    top_k,
)

__all__ = [
    "batchwise_mask",
    "cv_squared",
    "expert_choice",
    "expert_dropout",
    "gated",
    "group_limited",
    "hashed",
    "hierarchical",
    "hierarchical_load",
    "keep_within_capacity",
    "load_probability",
    "merged",
    "mixture",
    "moved_bias",
    "noisy_top_k",
    "of_real_items",
    "prioritised",
    "residual",
    "sinkhorn",
    "soft",
    "soft_mixture",
    "threshold_loss",
    "top_k",
]
