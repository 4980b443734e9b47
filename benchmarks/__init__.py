"""Timings of one layer against peers, on a GPU: ``python3 -m benchmarks``. No speed is reported before parity holds."""
