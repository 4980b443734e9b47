"""The vision transformer: patches as tokens, each routed by itself, and as much arithmetic as its dense twin."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from gatewright import aux_loss, moe_layers
from gatewright.models import VitConfig
from tests.cases import dense_weights

SMALL = VitConfig(num_layers=3, dim=16, num_heads=2, num_experts=4, top_k=2, dense_layers=1, stem=4)


@pytest.mark.parametrize("router", ["top-k", "expert-choice", "gated-hash"])
def test_patches_of_images_are_routed_in_the_layers_that_are_mixtures(router):
    model = replace(SMALL, router=router).build((3, 16, 24), 5)
    images = torch.randn(2, 3, 16, 24)
    (model(images).square().sum() + aux_loss(model)).backward()
    layers = dict(moe_layers(model))
    assert [*layers] == ["blocks.1.ffn", "blocks.2.ffn"]
    assert all(len(dense_weights(layer.routing)) == 2 * 4 * 6 for layer in layers.values())
    assert all(parameter.grad is not None for parameter in model.parameters())


def test_a_hash_sends_each_place_to_its_own_experts_whatever_is_there():
    model = replace(SMALL, router="hashed").build((3, 16, 16), 5).eval()
    model(torch.randn(1, 3, 16, 16))
    first = [layer.routing.expert_index for _, layer in moe_layers(model)]
    model(torch.randn(1, 3, 16, 16))
    for before, (_, layer) in zip(first, moe_layers(model), strict=True):
        assert torch.equal(before, layer.routing.expert_index)


def test_an_image_is_classified_alone_as_in_a_batch():
    model, images = SMALL.build((3, 16, 16), 5).eval(), torch.randn(3, 3, 16, 16)
    with torch.no_grad():
        assert_close(model(images[1:2])[0], model(images)[1], rtol=1e-4, atol=1e-5)


def test_a_layer_is_left_for_a_mixture():
    with pytest.raises(ValueError, match=r"`model.dense_layers` is below `model.num_layers`.*; got 3 and 3"):
        replace(SMALL, dense_layers=3)


def test_images_are_cut_into_whole_patches():
    with pytest.raises(ValueError, match=r"patches of 4 x 4 pixels; got images of 30 x 32"):
        SMALL.build((3, 30, 32), 5)
