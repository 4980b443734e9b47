"""Stratified splits that are the same in every run."""

from dataclasses import replace

import torch
from jaxtyping import Int64
from torch import Tensor

from gatewright.data.images.sources import ImageSource

TEST_SHARE = 0.2
TEST_SEED = 2
"""Of the test set where a data set has none: a constant, because runs are compared on the same images."""


def stratified_split(
    labels: Int64[Tensor, " images"], share: float, *, seed: int
) -> tuple[Int64[Tensor, " kept"], Int64[Tensor, " held"]]:
    """Split positions in two so that every class gives about the same share.

    The images are shuffled, lined up by class, and taken at even spacing: the total is `share` of the images to the
    nearest whole number, and no class is off by one or more.

    Args:
        labels: Class of each image.
        share: Share of the images to hold, in [0, 1).
        seed: Seed of the shuffle; the same seed and labels give the same split.

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


def with_test_images(source: ImageSource) -> ImageSource:
    """Return a source that has test images, and a note that says where they come from if it had none.

    The validation split is the test set then, or else a fifth of each class: the same images every time.
    """
    if source.test:
        return source
    if source.holdout:
        note = f"there is no test split, so the {len(source.holdout)} images of the validation split are the test set"
        return replace(source, holdout=(), test=source.holdout, notes=(*source.notes, note))
    labels = torch.tensor([image.label for image in source.train])
    kept, held = stratified_split(labels, TEST_SHARE, seed=TEST_SEED)
    note = (
        f"there is no test split, so {len(held)} of the {len(labels)} images, a fifth of each class, are the test set"
    )
    return replace(
        source,
        train=[source.train[place] for place in kept.tolist()],
        test=[source.train[place] for place in held.tolist()],
        notes=(*source.notes, note),
    )
