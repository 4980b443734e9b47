"""DeepSpeed's own layer as a part of our models: what it computes, and where it is refused."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from gatewright import ModuleExperts, MoE, TopK, aux_loss, moe_layers
from gatewright.integrations.deepspeed.engine import start_deepspeed
from gatewright.integrations.deepspeed.layer import DeepSpeedMoE
from gatewright.models import CnnConfig, ResNetsConfig
from gatewright.recipes import RECIPES
from gatewright.train.validate import validate
from tests.integrations.deepspeed.runs import installed

pytestmark = [pytest.mark.distributed, installed]
ROOM = {"capacity_factor": 8.0, "eval_capacity_factor": 8.0, "min_capacity": 4}


def beside_ours(item_shape):
    """Where nothing is dropped, its output, gate loss and gradients are those of our layer with the same weights."""
    start_deepspeed(torch.device("cpu"))
    torch.manual_seed(0)
    size = 12
    make = (lambda: nn.Linear(size, size)) if len(item_shape) == 1 else lambda: nn.Conv2d(3, 3, 3, padding=1)
    theirs = DeepSpeedMoE(make, 4, 1, item_shape=item_shape, losses={"load_balance": 0.3}, options=ROOM)
    copies = [copy.expert for copy in theirs.experts.deepspeed_experts]
    for number, copy in enumerate(copies):  # which DeepSpeed makes equal
        nn.init.normal_(copy.bias, number)
    router = TopK(size, 4)
    ours = MoE(router, ModuleExperts(copies), item_shape=item_shape, losses={"load_balance": 0.3})
    ours.router.gate.weight.data.copy_(theirs.router.gate.weight)
    x = torch.randn(10, *item_shape)
    found = []
    for layer in (theirs, ours):
        layer.zero_grad()
        y = layer(x) if layer is theirs else layer(x, x.flatten(1))
        loss = aux_loss(layer)
        (y.square().sum() + loss).backward()
        gate = layer.router.gate.weight.grad.clone()
        found.append([y.detach(), loss.detach(), gate, *(copy.bias.grad.clone() for copy in copies)])
    worst = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(*found, strict=True))
    gate_loss = float((0.3 * theirs.theirs.deepspeed_moe.l_aux.detach() - found[0][1]).abs())
    assert torch.equal(theirs.routing.sums.tokens_per_expert, ours.routing.sums.tokens_per_expert)
    return worst, gate_loss


@pytest.mark.parametrize("item_shape", [(12,), (3, 2, 2)])
def test_it_is_our_layer_where_nothing_is_dropped(ranks, item_shape):
    worst, gate_loss = ranks(1, beside_ours, item_shape)[0]
    assert worst < 1e-5
    assert gate_loss < 1e-6


def refused(config, image_shape):
    start_deepspeed(torch.device("cpu"))
    with pytest.raises(ValueError, match="gatewright") as caught:
        config.build(image_shape, 10)
    return str(caught.value)


def test_what_it_cannot_hold_is_refused(ranks):
    images = ResNetsConfig(num_experts=4, router="top-k", layer="deepspeed")
    assert "DeepSpeed's gate looks at the item itself, 3072 numbers" in ranks(1, refused, images, (3, 32, 32))[0]
    digits = replace(RECIPES["digits"]().model, router="top-k", layer="deepspeed", losses=None)
    said = ranks(1, refused, digits, (1, 8, 8))[0]
    assert "gives back as many numbers per item as it takes, 512 for items of shape (512,); its expert returns" in said


def built(config):
    """Whether a model has the layer, with its capacity, and how much its outputs differ between two batches."""
    start_deepspeed(torch.device("cpu"))
    torch.manual_seed(0)
    model = config.build((3, 32, 32), 10).eval()
    ((_, layer),) = moe_layers(model)
    gate = layer.theirs.deepspeed_moe.gate
    for number, copy in enumerate(layer.experts.deepspeed_experts):
        nn.init.normal_(copy.expert.weight, number)
    images = torch.rand(16, 3, 32, 32)
    alone = torch.cat([model(image[None]) for image in images])
    together = model(images)
    room = (gate.capacity_factor, gate.eval_capacity_factor, gate.min_capacity, gate.noisy_gate_policy)
    return room, float((alone - together).abs().max())


def test_its_settings_are_the_models(ranks):
    """Its evaluation has a capacity: what an image becomes depends on the others."""
    options = {"noisy_gate_policy": "RSample"}
    tight = CnnConfig(
        num_experts=8,
        top_k=1,
        router="top-k",
        layer="deepspeed",
        dispatch="capacity",
        capacity_factor=1.0,
        min_capacity=1,
        router_options=options,
    )
    room, difference = ranks(1, built, tight)[0]
    assert room == (1.0, 1.0, 1, "RSample")
    assert difference > 1e-3


def run_with_it(engine="deepspeed", **changes):
    recipe = RECIPES["cifar10-cnn"]()
    model = {"layer": "deepspeed", "router": "top-k", "upcycle_epoch": 0, **changes}
    return replace(recipe, engine=engine, model=replace(recipe.model, **model))


@pytest.mark.parametrize("changes", [{"router": "noisy-top-k"}, {"upcycle_epoch": 2}, {"expert_dropout": 0.1}])
def test_settings_that_it_has_no_place_for_are_refused(changes):
    with pytest.raises(ValueError, match=r"DeepSpeed's layer .* has a gate of its own: it needs model.router 'top-k'"):
        validate(run_with_it(**changes), 1, torch.device("cpu"))
