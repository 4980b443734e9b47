"""Auxiliary losses: pure functions of the sums that a routing carries, unweighted.

Registered by name in `LOSSES`; a layer multiplies each by its coefficient and `gatewright.aux_loss` adds them up.
"""

from collections.abc import Callable, Mapping
from types import MappingProxyType

from jaxtyping import Float
from torch import Tensor

from gatewright.routing import RoutingSums


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
    return cv_squared(expert_load(sums))


def expert_load(sums: RoutingSums) -> Float[Tensor, " experts"]:
    """``Load(X)`` of every expert, of both levels where there are two.

    ``Load_H(X)_ij = Load_primary(X)_i Load_i(X_i)_j / |X_i|``, https://arxiv.org/abs/1701.06538 appendix B: the product
    keeps a gradient to the upper level. It is 0 in a group that no token chose.
    """
    if len(sums.group_load) == 0:
        return sums.load
    per_token = sums.load.view(len(sums.group_load), -1) / sums.group_tokens.clamp(min=1)[:, None]
    return (sums.group_load[:, None] * per_token).flatten()


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


def threshold_loss(sums: RoutingSums) -> Float[Tensor, ""]:
    """``L_batchwise`` of https://arxiv.org/abs/1701.06538 appendix F, as a mean over tokens instead of a sum."""
    return sums.threshold / sums.num_tokens.clamp(min=1)


LOSSES: Mapping[str, Callable[[RoutingSums], Tensor]] = MappingProxyType(
    {
        "importance": importance_loss,
        "load": load_loss,
        "load_balance": load_balance_loss,
        "router_z": router_z_loss,
        "threshold": threshold_loss,
    }
)
