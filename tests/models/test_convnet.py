"""The small convolutional network: fixed filters that decorrelate, and blocks that are dense, routed or merged."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from gatewright import aux_loss, moe_layers
from gatewright.models import ConvNetConfig
from gatewright.models.convnet import PatchStem

SMALL = ConvNetConfig(widths=(4, 6, 8), num_experts=3, top_k=1, router="top-k", gate_size=8, losses={})
MERGED = replace(SMALL, experts="merged", top_k=3)


def test_the_stems_outputs_have_variance_one_and_colours_and_places_apart():
    stem = PatchStem(3)
    images = torch.rand(64, 1, 8, 8).expand(-1, 3, -1, -1) + 0.1 * torch.rand(64, 3, 8, 8)  # grey is most of it
    filtered = stem.norm(torch.nn.functional.conv2d(images, stem.filters))
    assert_close(filtered.var((0, 2, 3)), torch.ones(12), rtol=0.05, atol=0)
    flat = stem.filters.flatten(1)
    assert_close(flat @ flat.T, torch.eye(12), rtol=0, atol=1e-6)
    assert stem(images).shape == (64, 24, 7, 7)


@pytest.mark.parametrize("config", [SMALL, MERGED, replace(SMALL, num_experts=1), replace(MERGED, mixture_blocks=3)])
@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 9, 17)])
def test_every_parameter_that_a_batch_uses_is_trained(config, shape):
    model = config.build(shape, 5)
    expected = 0 if config.num_experts == 1 else config.mixture_blocks * (2 if config.experts == "merged" else 1)
    assert len(list(moe_layers(model))) == expected
    logits = model(torch.randn(12, *shape))
    assert logits.shape == (12, 5)
    loss = logits.square().sum()
    (loss + aux_loss(model) if expected else loss).backward()
    untrained = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert all("experts" in name for name in untrained)  # an expert that no image was sent to


def test_a_dense_network_has_the_names_of_the_mixture_that_it_becomes():
    dense = {name for name, _ in replace(SMALL, num_experts=1).build((3, 32, 32), 5).named_parameters()}
    mixture = {name for name, _ in SMALL.build((3, 32, 32), 5).named_parameters()}
    assert {name for name in dense if ".mixture." not in name} <= mixture
    assert any(".mixture." in name for name in dense)


def test_more_blocks_than_there_are_are_refused():
    with pytest.raises(ValueError, match=r"`model.mixture_blocks` is at most 3; got 4"):
        replace(SMALL, mixture_blocks=4)
    with pytest.raises(ValueError, match=r"greater than 0"):
        replace(SMALL, mixture_blocks=0)
    with pytest.raises(ValueError, match=r"images of more than 8 x 8 pixels; got 8 x 32. Set data.image_size"):
        SMALL.build((3, 8, 32), 5)
