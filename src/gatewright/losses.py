"""Auxiliary losses: pure functions of the sums that a routing carries, unweighted.

Registered by name in `LOSSES`; a layer multiplies each by its coefficient and `gatewright.aux_loss` adds them up. A
loss that reads what one router alone has sums of is beside that router, in its `own_losses`.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor

from gatewright.names import known
from gatewright.routing_sums import Loss, RoutingSums


def cv_squared(values: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    """Squared coefficient of variation, ``var / mean ** 2``, with the population variance.

    1e-10 is added to the squared mean, as tensor2tensor's authors do, so that it is 0 where every value is 0. It is 0
    for one expert.
    """
    return values.var(correction=0) / (values.mean().square() + 1e-10)


def importance_loss(sums: RoutingSums) -> Float[Tensor, ""]:
    """``CV(Importance(X)) ** 2``: https://arxiv.org/abs/1701.06538 eq. 7, without ``w_importance``."""
    return cv_squared(sums.importance)


def load_loss(sums: RoutingSums) -> Float[Tensor, ""]:
    """``CV(Load(X)) ** 2``: https://arxiv.org/abs/1701.06538 eq. 11, without ``w_load``.

    Its gradient reaches the router through the noise distribution; where a router draws no noise, or chooses every
    expert, load is a count and the loss a constant.
    """
    return cv_squared(sums.load)


def load_balance_loss(sums: RoutingSums) -> Float[Tensor, ""]:
    """``experts * sum_e f_e P_e``: https://arxiv.org/abs/2101.03961 eq. 4, without ``alpha``.

    ``f_e`` is the share of assignments that chose expert e, dropped or not, without gradient; ``P_e`` its mean
    probability. For top_k above 1 the share is over tokens x top_k, so that an even load gives exactly 1.
    """
    counts = sums.tokens_per_expert.to(sums.probs.dtype)
    share = counts / counts.sum().clamp(min=1)
    mean_probs = sums.probs / sums.num_tokens.clamp(min=1)
    return len(share) * (share.detach() * mean_probs).sum()


def router_z_loss(sums: RoutingSums) -> Float[Tensor, ""]:
    """Mean over tokens of ``logsumexp(logits) ** 2``: https://arxiv.org/abs/2202.08906 eq. 5, without ``c_z``."""
    return sums.router_z / sums.num_tokens.clamp(min=1)


Coefficients = Mapping[str, float] | Mapping[str | Loss, float]
"""What each auxiliary loss counts for, by its name or by a function of your own."""

LOSSES: Mapping[str, Loss] = MappingProxyType(
    {
        "importance": importance_loss,
        "load": load_loss,
        "load_balance": load_balance_loss,
        "router_z": router_z_loss,
    }
)


def by_name(coefficients: Coefficients, own_losses: Mapping[str, Loss]) -> tuple[dict[str, Loss], dict[str, float]]:
    """Return functions and coefficients of auxiliary losses by name; a function given in place of one has its own.

    Args:
        coefficients: Each loss's coefficient, by its name in `LOSSES` or ``own_losses`` or by its function.
        own_losses: Those of a router.

    Raises:
        ValueError: If a loss is unknown, two of them have one name, or a coefficient is not finite.
    """
    asked: dict[str | Loss, float] = dict(coefficients.items())
    functions = {**LOSSES, **own_losses, **{_name(loss): loss for loss in asked if callable(loss)}}
    named = {_name(loss): float(coefficient) for loss, coefficient in asked.items()}
    if len(named) < len(asked):
        raise ValueError(
            f"Auxiliary losses have different names; got {', '.join(map(_name, asked))}. Give each function of your "
            "own a name of its own."
        )
    for name, coefficient in named.items():
        known(name, functions, "auxiliary loss")
        if not math.isfinite(coefficient):
            raise ValueError(f"The coefficient of an auxiliary loss is finite; got {coefficient} for {name}.")
    return functions, named


def _name(loss: str | Loss) -> str:
    return loss if isinstance(loss, str) else getattr(loss, "__name__", type(loss).__name__)
