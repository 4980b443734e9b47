"""Routers: who goes where, and how much it counts."""

from collections.abc import Mapping
from types import MappingProxyType

from gatewright.routers.base import Router
from gatewright.routers.noisy_top_k import NoisyTopK, load_probability
from gatewright.routers.top_k import TopK

ROUTERS: Mapping[str, type[Router]] = MappingProxyType(
    {
        "noisy-top-k": NoisyTopK,
        "top-k": TopK,
    }
)
"""Every router by name. The contract suite runs over all of them."""

__all__ = [
    "ROUTERS",
    "NoisyTopK",
    "Router",
    "TopK",
    "load_probability",
]
