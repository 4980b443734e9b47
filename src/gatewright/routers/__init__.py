"""Routers: who goes where, and how much it counts."""

from collections.abc import Mapping
from types import MappingProxyType

from gatewright.routers.base import Router, load_probability
from gatewright.routers.biased import Biased
from gatewright.routers.expert_choice import ExpertChoice
from gatewright.routers.expert_dropout import ExpertDropout
from gatewright.routers.group_limited import GroupLimited
from gatewright.routers.hashed import Hashed, TokenGate
from gatewright.routers.hierarchical import Hierarchical
from gatewright.routers.noisy_top_k import NoisyTopK
from gatewright.routers.product_key import ProductKey
from gatewright.routers.sinkhorn import Sinkhorn
from gatewright.routers.soft import Soft
from gatewright.routers.top_k import TopK

ROUTERS: Mapping[str, type[Router]] = MappingProxyType(
    {
        "biased": Biased,
        "expert-choice": ExpertChoice,
        "group-limited": GroupLimited,
        "hashed": Hashed,
        "hierarchical": Hierarchical,
        "noisy-top-k": NoisyTopK,
        "product-key": ProductKey,
        "sinkhorn": Sinkhorn,
        "top-k": TopK,
    }
)
"""Every router of `gatewright.MoE` by name. The contract suite runs over all of them."""

__all__ = [
    "ROUTERS",
    "Biased",
    "ExpertChoice",
    "ExpertDropout",
    "GroupLimited",
    "Hashed",
    "Hierarchical",
    "NoisyTopK",
    "ProductKey",
    "Router",
    "Sinkhorn",
    "Soft",
    "TokenGate",
    "TopK",
    "load_probability",
]
