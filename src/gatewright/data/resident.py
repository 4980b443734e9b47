"""Data sets on the GPU that trains, where there is room for them: it makes its batches itself then."""

from typing import TypeVar

import torch

from gatewright.data.images.image_set import ImageSet
from gatewright.data.text.text_set import TextSet

SHARE = 0.25
"""The share of a GPU's free memory that a data set may take."""

Part = TypeVar("Part", ImageSet, TextSet)


def resident(part: Part, device: torch.device) -> Part:
    """Return a data set on a GPU where it fits beside a model, or as it is."""
    fits = device.type == "cuda" and part.nbytes <= SHARE * torch.cuda.mem_get_info(device)[0]
    return part.to(device) if fits else part
