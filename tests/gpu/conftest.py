"""Tests that need a CUDA device; without one each says so and is skipped."""

import pytest
import torch


def pytest_collection_modifyitems(items):
    """Mark what is in this folder, and skip it where there is no device."""
    here = [item for item in items if "tests/gpu/" in item.path.as_posix()]
    for item in here:
        item.add_marker(pytest.mark.gpu)
        if not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
