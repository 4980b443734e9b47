from itertools import product

import torch

from gatewright.data.images.split import stratified_split


def test_every_class_gives_its_share():
    for share, num_images in product([0.0, 0.05, 0.1, 0.2, 0.5, 0.99], [0, 1, 63, 1000]):
        labels = torch.randint(0, 7, (num_images,)) ** 2 % 7  # some classes large, some empty
        kept, held = stratified_split(labels, share, seed=0)
        assert torch.equal(torch.cat([kept, held]).sort().values, torch.arange(num_images))
        assert len(held) == round(share * num_images)
        expected = share * labels.bincount(minlength=7)
        off = labels[held].bincount(minlength=7) - expected
        assert (off.abs() < 1.5).all()  # 1 by spacing, 1/2 by rounding of the total


def test_the_split_is_a_shuffle_fixed_by_its_seed():
    labels = torch.arange(200) % 4
    held = [stratified_split(labels, 0.25, seed=seed)[1] for seed in (0, 0, 1)]
    assert torch.equal(held[0], held[1])
    assert not torch.equal(held[0], held[2])
    assert held[0].diff().unique().numel() > 5
