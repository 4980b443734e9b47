"""Kernels in Triton, behind the operations in `gatewright.ops`; nothing here is imported where Triton is not used."""
