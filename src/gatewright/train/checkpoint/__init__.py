"""Checkpoints: their format, writing and loading them, and going on from one."""
