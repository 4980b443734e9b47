"""Operations with several back-ends; the choice is made here, in one place."""

from gatewright.ops.grouped_mm import grouped_mm
from gatewright.ops.sinkhorn import sinkhorn

__all__ = ["grouped_mm", "sinkhorn"]
