"""Merged experts: what an item sees of the others, and what runs."""

from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from gatewright import MergedMoE, TopK, aux_loss, moe_layers
from gatewright.tasks import class_by_expert
from tests.cases import make_merged, make_router
from tests.compare import compiled_step


def cond_conv(**options):
    """Images of 4 x 7 x 6 through one of 3 mixed kernels."""
    router = make_router("top-k-sigmoid", 4, 3, 3)
    return MergedMoE(router, partial(nn.Conv2d, 4, 6, 3, **options), 3, item_shape=(4, 7, 6), losses={})


def test_each_expert_keeps_its_own_initialisation():
    layer = MergedMoE(TopK(8, 3, 3), lambda: nn.Linear(8, 8), num_experts=3)
    first, second, third = (expert.weight for expert in layer.experts)
    assert not torch.allclose(first, second)
    assert not torch.allclose(second, third)
    assert list(layer.state_dict()) == [
        "router.gate.weight",
        *(f"experts.{i}.{n}" for i in range(3) for n in ("weight", "bias")),
    ]


@pytest.mark.parametrize("batch", [(5,), (2, 3), (1, 1), (0,), (2, 0)])
def test_leading_dimensions_are_free(batch):
    layer, x = cond_conv(), torch.randn(*batch, 4, 7, 6)
    output = layer(x, x.mean((-2, -1)))
    flat = x.flatten(0, -4)
    assert output.shape == (*batch, 6, 5, 4)
    assert_close(output.flatten(0, -4), layer(flat, flat.mean((-2, -1))))


def test_a_frozen_expert_gets_none():
    layer = make_merged(num_experts=3)
    layer.losses.clear()
    layer.experts[1].requires_grad_(False)
    layer(torch.randn(9, 8)).sum().backward()
    assert [all(p.grad is None for p in expert.parameters()) for expert in layer.experts] == [False, True, False]


def test_the_arithmetic_is_one_convolution_per_item_and_the_mixing():
    layer, x = cond_conv(), torch.randn(5, 4, 7, 6)
    with FlopCounterMode(display=False) as counter:
        layer(x, x.mean((-2, -1)))
    weights, places = 6 * 4 * 3 * 3, 5 * 4
    assert counter.get_total_flops() == 2 * 5 * (4 * 3 + 3 * (weights + 6) + weights * places)


def test_dropout_draws_for_each_item():
    def expert():
        return nn.Sequential(nn.Linear(8, 200, bias=False), nn.Dropout(0.25))

    layer = MergedMoE(TopK(8, 2, 2), expert, 2, losses={})
    x = torch.ones(40, 8, requires_grad=True)
    output = layer(x)
    kept = output != 0
    scaled = torch.where(kept, layer.eval()(x) / 0.75, 0)
    assert_close(output, scaled)
    assert len({tuple(row.tolist()) for row in kept}) == 40
    deviation = (0.25 * 0.75 / kept.numel()) ** 0.5
    assert abs(kept.float().mean() - 0.75) < 5 * deviation
    names, parameters = zip(*layer.named_parameters(), strict=True)
    actual, expected = (torch.autograd.grad(y.square().sum(), parameters) for y in (output, scaled))
    for name, one, other in zip(names, actual, expected, strict=True):
        assert_close(one, other, msg=name)


def test_autocast_reaches_the_experts_and_not_the_mixing():
    layer, x = cond_conv(), torch.randn(5, 4, 7, 6, requires_grad=True)
    features = x.detach().mean((-2, -1))
    plain = layer(x, features)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x, features)
        mixed = layer.mixed_parameters(layer.router(features), 5)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), plain, rtol=0.02, atol=0.02)
    for name, value in layer.mixed_parameters(layer.router(features), 5).items():
        assert torch.equal(mixed[name], value)
    assert {p.grad.dtype for p in layer.parameters()} | {x.grad.dtype} == {torch.float32}


def test_parameters_of_low_precision_are_mixed_in_float32():
    """Sixteen times 1 / 16 and a bit that a weight of the parameters' type would lose."""
    layer = MergedMoE(TopK(8, 16, 16, score="sigmoid"), partial(nn.Linear, 8, 8), 16).to(torch.bfloat16)
    weight = torch.full((1, 16), (1 + 0.45 * torch.finfo(torch.bfloat16).eps) / 16)
    routing = layer.router(torch.randn(1, 8, dtype=torch.bfloat16))
    routing = type(routing)(routing.token_index, routing.expert_index, weight.flatten(), routing.sums)
    with torch.no_grad():
        for expert in layer.experts:
            expert.bias.fill_(1.0)
    exact = weight.double().sum().to(torch.bfloat16)
    assert torch.equal(layer.mixed_parameters(routing, 1)["bias"], exact.expand(1, 8))
    assert layer(torch.randn(3, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_it_is_a_routed_layer():
    layer, labels = make_merged("noisy-top-k"), torch.arange(9) % 3
    assert list(moe_layers(nn.Sequential(layer))) == [("0", layer)]
    with pytest.raises(RuntimeError, match="auxiliary loss was taken"):
        layer(torch.randn(9, 8)).sum().backward()
    layer(torch.randn(9, 8))
    assert aux_loss(layer) > 0
    assert not layer.routing.weight.requires_grad
    seen = class_by_expert(layer.routing, labels, 3)
    assert seen.sum(1).tolist() == [6, 6, 6]  # each class had 3 images, and each of them 2 experts
    assert_close(seen.sum(0), layer.routing.sums.tokens_per_expert)


def convolution_agrees_with_eager():
    router = make_router("noisy-top-k", 4 * 7 * 6, 3, 2)
    layer = MergedMoE(router, partial(nn.Conv2d, 4, 6, 3), 3, item_shape=(4, 7, 6))
    found = compiled_step(layer, torch.randn(13, 4, 7, 6), backend="aot_eager", fullgraph=True)
    assert max(found.values()) <= 1e-5, found


def test_convolutions_compile_to_one_graph(run_unhooked):
    """Vectors do in `tests/promises`."""
    run_unhooked(convolution_agrees_with_eager)
