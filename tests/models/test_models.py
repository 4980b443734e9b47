"""What every ready-made model keeps to."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import MoE, aux_loss, moe_layers
from gatewright.models import Cnn, CnnConfig, DigitsCnn, DigitsConfig, MixtureOfResNets, ResNetsConfig

CASES = {
    "cnn": (CnnConfig(num_experts=4), (3, 32, 32), Cnn),
    "digits-colour": (DigitsConfig(width=4, num_experts=6, top_k=3), (3, 9, 7), DigitsCnn),
    "small-grey": (ResNetsConfig(num_experts=2, gate_size=8, emit="logits"), (1, 9, 9), MixtureOfResNets),
    "small-stem": (ResNetsConfig(num_experts=2, gate_size=8, stem_depth=2), (3, 16, 16), MixtureOfResNets),
    "small-wide": (ResNetsConfig(num_experts=2, gate_size=8, feature_size=30), (3, 16, 16), MixtureOfResNets),
}

cases = pytest.mark.parametrize("case", CASES)


def build(case, num_classes=5, **changes):
    config, shape, kind = CASES[case]
    model = replace(config, **changes).build(shape, num_classes)
    assert type(model) is kind
    return model, torch.randn(6, *shape)


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


@cases
def test_logits_per_image(case):
    for num_classes in [2, 128]:
        model, images = build(case, num_classes)
        assert model(images).shape == (6, num_classes)
        assert model.eval()(images[:1]).shape == (1, num_classes)


@cases
def test_every_parameter_learns(case):
    model, images = build(case, top_k=CASES[case][0].num_experts)
    with torch.no_grad():
        for _, layer in moe_layers(model):
            layer.router.gate.weight.normal_(std=0.01)
    loss = nn.functional.cross_entropy(model(images.repeat(8, 1, 1, 1)), torch.arange(48) % 5)
    (loss + aux_loss(model)).backward()
    idle = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    assert idle == []


@cases
def test_the_dense_twin_is_the_same_network_with_one_expert(case):
    model, images = build(case)
    dense, _ = build(case, num_experts=1)
    (layer,) = (layer for _, layer in moe_layers(model))
    experts = list(layer.experts.experts)
    assert {size(expert) for expert in experts} == {size(experts[0])}
    assert not torch.equal(*(next(expert.parameters()) for expert in experts[:2]))
    gate = size(layer.router) + (size(model.router_features) if hasattr(model, "router_features") else 0)
    assert size(model) - gate == size(dense) + (len(experts) - 1) * size(experts[0])
    assert not any(isinstance(module, MoE) for module in dense.modules())
    assert dense(images).shape == (6, 5)


@cases
def test_the_mixture_of_one_experts_copies_is_the_dense_twin(case):
    """Weights that sum to 1 times equal outputs: the same function."""
    model, images = build(case, router="top-k", router_options={"score_after_top_k": True})
    dense, _ = build(case, num_experts=1)
    (layer,) = (layer for _, layer in moe_layers(model))
    for expert in layer.experts.experts:
        expert.load_state_dict(dense.mixture.state_dict())
    rest = {name: value for name, value in dense.state_dict().items() if not name.startswith("mixture.")}
    assert model.load_state_dict(rest, strict=False).unexpected_keys == []
    with torch.no_grad():
        assert_close(model.eval()(images), dense.eval()(images), rtol=1e-4, atol=1e-5)


@cases
def test_settings_reach_the_layer(case):
    losses = {"load_balance": 0.5}
    changes = {"router": "top-k", "top_k": 1, "losses": losses, "dispatch": "capacity", "capacity_factor": 3.0}
    model, _ = build(case, **changes, min_capacity=2, priority="total-weight")
    (layer,) = (layer for _, layer in moe_layers(model))
    assert (type(layer.router).__name__, layer.router.top_k, layer.losses) == ("TopK", 1, losses)
    assert repr(layer.dispatcher) == "Capacity(3.0, min_capacity=2, priority='total-weight')"


def test_the_cnn_needs_images_of_sixteen_pixels():
    assert CnnConfig().build((3, 16, 16), 10)(torch.randn(2, 3, 16, 16)).shape == (2, 10)
    for shape in ((3, 15, 32), (3, 32, 15)):
        with pytest.raises(ValueError, match=r"The CNN takes images of at least 16 x 16 pixels; got \d+ x \d+"):
            CnnConfig().build(shape, 10)
