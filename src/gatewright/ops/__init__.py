"""Operations with several back-ends; the choice is made here, in one place."""

from gatewright.ops.grouped_mm import expert_of_rows, grouped_mm
from gatewright.ops.sinkhorn import sinkhorn
from gatewright.ops.stable_sort import stable_sort

__all__ = ["expert_of_rows", "grouped_mm", "sinkhorn", "stable_sort"]
