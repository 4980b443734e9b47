"""Operations with several back-ends; the choice is made here, in one place."""

from gatewright.ops.grouped_mm import expert_of_rows, grouped_mm
from gatewright.ops.sinkhorn import sinkhorn

__all__ = ["expert_of_rows", "grouped_mm", "sinkhorn"]
