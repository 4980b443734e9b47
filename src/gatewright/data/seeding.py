"""Randomness that is a function of what it is for, so that a run can be taken up again anywhere."""

import hashlib

import torch


def generator_for(purpose: str, *numbers: int) -> torch.Generator:
    """Seed a generator from all the numbers; sums such as seed + epoch would make runs share their randomness."""
    digest = hashlib.blake2b(repr((purpose, *numbers)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
