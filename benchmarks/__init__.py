"""Timings on a GPU: one layer against peers (``python3 -m benchmarks``, after parity), and whole steps (``.steps``)."""
