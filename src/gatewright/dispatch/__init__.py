"""Dispatchers: the whole trip to the experts and back."""

from collections.abc import Mapping
from types import MappingProxyType

from gatewright.dispatch.base import Dispatcher, ExpertBatch
from gatewright.dispatch.capacity import Capacity, Priority
from gatewright.dispatch.dropless import Dropless

DISPATCHERS: Mapping[str, type[Dispatcher]] = MappingProxyType(
    {
        "capacity": Capacity,
        "dropless": Dropless,
    }
)
"""Every dispatcher by name. The contract suite runs over all of them."""

__all__ = [
    "DISPATCHERS",
    "Capacity",
    "Dispatcher",
    "Dropless",
    "ExpertBatch",
    "Priority",
]
