"""What stands beside routed experts against the reference: shared experts, residual mixtures and merged experts.

Outputs, and gradients of every input and parameter, at odd sizes.
"""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from gatewright import MergedMoE, ModuleExperts, MoE, ResidualMixture, TopK, reference
from tests.cases import (
    DISPATCHER_CASES,
    EXPERT_CASES,
    KEYED,
    ROUTER_CASES,
    features_for,
    make_merged,
    make_router,
    one_by_one,
    reference_gates,
    reference_kept,
    two_layers,
)

SEED = 1
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}

pytestmark = [pytest.mark.usefixtures("poisoned"), pytest.mark.filterwarnings("ignore:A capacity of 1 row")]
sizes = pytest.mark.parametrize("num_tokens", [1, 2, 13])
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])


def results(compute, layer, inputs, upstream):
    """Output and gradients, by name; a gradient of None, of what the loops never touched, counts as 0."""
    layer = copy.deepcopy(layer)
    leaves = {f"input {i}": value.clone().requires_grad_(value.is_floating_point()) for i, value in enumerate(inputs)}
    torch.manual_seed(SEED)
    output = compute(layer, *leaves.values())
    output.backward(upstream)
    leaves = {name: leaf for name, leaf in {**leaves, **dict(layer.named_parameters())}.items() if leaf.requires_grad}
    gradients = {name: torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items()}
    return {"output": output.detach(), **gradients}


def check(layer, by_the_reference, inputs, dtype):
    """Compare: largest difference over the largest entry, or over 0.1 where all entries are less."""
    layer = layer.to(dtype)
    inputs = [value.to(dtype) if value.is_floating_point() else value for value in inputs]
    upstream = torch.randn_like(layer(*inputs))
    actual = results(lambda layer, *inputs: layer(*inputs), layer, inputs, upstream)
    expected = results(by_the_reference, layer, inputs, upstream)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert value.shape == expected[name].shape
        difference = (value - expected[name]).abs().max()
        assert difference <= TOLERANCE[dtype] * expected[name].abs().max().clamp(min=0.1), name


def merged(layer, x, features=None):
    gates = reference_gates(layer.router, x.flatten(1) if features is None else features)
    return reference.merged(x, gates, list(layer.experts))


def mixture(moe, x, features=None):
    features = x.flatten(1) if features is None else features
    gates = reference_gates(moe.router, features)
    torch.manual_seed(SEED)
    kept = reference_kept(gates, moe.router(features), moe.dispatcher, moe.training)
    return reference.mixture(x, kept, one_by_one(moe.experts), moe.shared)


def residual(layer, x, features=None):
    kept = layer.branch(x)
    inside = merged if isinstance(layer.moe, MergedMoE) else mixture
    return reference.residual(x, inside(layer.moe, x, features), kept, layer.coefficient)


@pytest.mark.parametrize("router", ROUTER_CASES)
@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_merged_with_every_router(router, training):
    layer = make_merged(router, dim=7).train(training)
    layer.losses.clear()
    keys = [features_for(layer.router, 9)] if type(layer.router) in KEYED else []
    check(layer, merged, [torch.randn(9, 7), *keys], torch.float64)


MERGED = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "mlp": (lambda: two_layers(7, 3), (7,)),
    "norm": (lambda: nn.Sequential(nn.Linear(7, 6), nn.GroupNorm(2, 6), nn.GELU(), nn.Linear(6, 2)), (7,)),
    "to-a-number": (lambda: nn.Sequential(nn.Linear(7, 1), nn.Flatten(0)), (7,)),
    "over-time": (lambda: nn.Linear(3, 2), (5, 3)),
}


@sizes
@dtypes
@pytest.mark.parametrize("case", MERGED)
def test_smear(case, dtype, num_tokens):
    """Softmax over all experts, https://arxiv.org/abs/2306.03745."""
    make, item_shape = MERGED[case]
    router = make_router("top-k", torch.Size(item_shape).numel(), 4, 4)
    layer = MergedMoE(router, make, 4, item_shape=item_shape, losses={})
    check(layer, merged, [torch.randn(num_tokens, *item_shape)], dtype)


CONVOLUTIONS = {
    "plain": partial(nn.Conv2d, 4, 6, 3),
    "strided": partial(nn.Conv2d, 4, 2, 3, stride=2, padding=1, bias=False),
    "depthwise": partial(nn.Conv2d, 4, 4, 3, groups=4, padding=2, dilation=2),
    "network": lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}


@sizes
@dtypes
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_cond_conv(case, dtype, num_tokens):
    """Sigmoids of a gate over the mean of each channel, https://arxiv.org/abs/1904.04971."""
    router = make_router("top-k-sigmoid", 4, 3, 3)
    layer = MergedMoE(router, CONVOLUTIONS[case], 3, item_shape=(4, 7, 6), losses={})
    x = torch.randn(num_tokens, 4, 7, 6)
    check(layer, merged, [x, x.mean((-2, -1))], dtype)


@sizes
@dtypes
@pytest.mark.parametrize("experts", EXPERT_CASES)
@pytest.mark.parametrize("dispatcher", DISPATCHER_CASES)
def test_shared(experts, dispatcher, dtype, num_tokens):
    router, routed = make_router("noisy-top-k", 7, 5, 2), EXPERT_CASES[experts](5, 7)
    dispatcher = DISPATCHER_CASES[dispatcher]()
    moe = MoE(router, routed, dispatcher=dispatcher, losses={}, shared=two_layers(7, 11))
    check(moe, mixture, [torch.randn(num_tokens, 7)], dtype)


def test_shared_over_images_routed_by_other_features():
    experts = ModuleExperts(lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(18, 4)), 3)
    shared = nn.Sequential(nn.Flatten(), nn.Linear(75, 4))
    moe = MoE(make_router("top-k", 6, 3, 2), experts, item_shape=(3, 5, 5), losses={}, shared=shared)
    check(moe, mixture, [torch.randn(13, 3, 5, 5), torch.randn(13, 6)], torch.float64)


def random_coefficient(layer):
    """The coefficients start at zero, where they have no gradient to the items."""
    for parameter in layer.coefficient.parameters():
        nn.init.normal_(parameter)
    return layer


@sizes
@dtypes
@pytest.mark.parametrize("branch", [None, lambda: two_layers(7, 5)], ids=["identity", "dense"])
@pytest.mark.parametrize("dispatcher", DISPATCHER_CASES)
def test_residual(branch, dispatcher, dtype, num_tokens):
    experts, dispatcher = EXPERT_CASES["modules"](5, 7), DISPATCHER_CASES[dispatcher]()
    moe = MoE(make_router("noisy-top-k", 7, 5, 2), experts, dispatcher=dispatcher, losses={})
    layer = ResidualMixture(moe, branch and branch())
    check(random_coefficient(layer), residual, [torch.randn(num_tokens, 7)], dtype)


def test_residual_of_images_routed_by_other_features():
    experts = ModuleExperts(partial(nn.Conv2d, 3, 2, 3), 3)
    moe = MoE(make_router("top-k", 6, 3, 2), experts, item_shape=(3, 5, 5), losses={})
    layer = random_coefficient(ResidualMixture(moe, nn.Conv2d(3, 2, 3)))
    check(layer, residual, [torch.randn(13, 3, 5, 5), torch.randn(13, 6)], torch.float64)


def test_residual_of_merged_experts():
    layer = ResidualMixture(MergedMoE(TopK(7, 4, 4), partial(nn.Linear, 7, 7), 4, losses={}))
    check(random_coefficient(layer), residual, [torch.randn(13, 7)], torch.float64)
