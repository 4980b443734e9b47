"""Operations with several back-ends; the choice is made here, in one place."""

from gatewright.ops.feed_forward import routed_feed_forward
from gatewright.ops.grouped_mm import expert_of_rows, grouped_mm
from gatewright.ops.memory import GradientMemory
from gatewright.ops.memory_format import in_memory_format, split_rows
from gatewright.ops.padding import pad
from gatewright.ops.registry import BACKENDS, backends, choose_backend
from gatewright.ops.sinkhorn import sinkhorn
from gatewright.ops.stable_sort import sort_groups, stable_sort
from gatewright.ops.wide_product import wide_product

__all__ = [
    "BACKENDS",
    "GradientMemory",
    "backends",
    "choose_backend",
    "expert_of_rows",
    "grouped_mm",
    "in_memory_format",
    "pad",
    "routed_feed_forward",
    "sinkhorn",
    "sort_groups",
    "split_rows",
    "stable_sort",
    "wide_product",
]
