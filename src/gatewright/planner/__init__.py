"""Predictions: how large a model is, how much memory and time it takes, and how to spread it over processes."""

from gatewright.planner.cost import Links
from gatewright.planner.measure import measure_sizes
from gatewright.planner.plan import Device, Plan, plan, smallest
from gatewright.planner.sizes import Part, Sizes, feed_forward_sizes

__all__ = [
    "Device",
    "Links",
    "Part",
    "Plan",
    "Sizes",
    "feed_forward_sizes",
    "measure_sizes",
    "plan",
    "smallest",
]
