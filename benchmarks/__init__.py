"""Timings on a CPU or a GPU: one layer against peers, many experts, images, and whole training steps."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # torch's profiler, which counts memory, says when it starts and stops.
