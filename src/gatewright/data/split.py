"""Stratified splits that are the same in every run."""

import torch
from jaxtyping import Int64
from torch import Tensor


def stratified_split(
    labels: Int64[Tensor, " images"], share: float, *, seed: int
) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " held"]]:
    """Split positions in two so that every class gives about the same share.

    The images are shuffled, lined up by class, and taken at even spacing: the total is `share` of the images to the
    nearest whole number, and no class is off by one or more.

    Args:
        labels: class of each image.
        share: part to hold, in [0, 1).
        seed: of the shuffle; the same seed and labels give the same split.

    Returns:
        The positions kept and the positions held, each ascending.
    """
    shuffled = torch.randperm(len(labels), generator=torch.Generator().manual_seed(seed))
    by_class = shuffled[labels[shuffled].argsort(stable=True)]
    num_held = round(share * len(labels))
    places = (2 * torch.arange(num_held) + 1) * len(labels) // max(2 * num_held, 1)
    is_held = torch.zeros(len(labels), dtype=torch.bool)
    is_held[by_class[places]] = True
    return (~is_held).nonzero().squeeze(1), is_held.nonzero().squeeze(1)
