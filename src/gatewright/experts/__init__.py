"""Experts: one output row per row."""

from collections.abc import Mapping
from types import MappingProxyType

from gatewright.experts.base import Experts
from gatewright.experts.grouped import GroupedFeedForward
from gatewright.experts.modules import ModuleExperts

EXPERTS: Mapping[str, type[Experts]] = MappingProxyType(
    {
        "grouped-feed-forward": GroupedFeedForward,
        "modules": ModuleExperts,
    }
)
"""Every kind of experts by name. The contract suite runs over all of them."""

__all__ = [
    "EXPERTS",
    "Experts",
    "GroupedFeedForward",
    "ModuleExperts",
]
