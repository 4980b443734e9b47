"""What stands beside routed experts against the reference: shared experts, residual mixtures and merged experts.

Outputs, and gradients of every input and parameter, at odd sizes.
"""

from functools import partial

import pytest
import torch
from torch import nn

from gatewright import MergedMoE, ModuleExperts, MoE, ResidualMixture
from tests.cases import KEYED, ROUTER_CLASSES, features_for, make_merged, make_router, two_layers
from tests.compare import by_the_layer, by_the_reference, differences, results

pytestmark = pytest.mark.usefixtures("poisoned")
sizes = pytest.mark.parametrize("num_tokens", [1, 13])


def check(layer, inputs):
    layer, inputs = layer.double(), [value.double() if value.is_floating_point() else value for value in inputs]
    upstream = torch.randn_like(layer(*inputs))
    actual, expected = (results(compute, layer, inputs, upstream) for compute in (by_the_layer, by_the_reference))
    for name, difference in differences(actual, expected).items():
        assert difference <= 1e-12, name


@pytest.mark.parametrize("router", ROUTER_CLASSES)
def test_merged_with_every_router(router):
    layer = make_merged(router, dim=7)
    layer.losses.clear()
    keys = [features_for(layer.router, 9)] if type(layer.router) in KEYED else []
    for training in (True, False):
        check(layer.train(training), [torch.randn(9, 7), *keys])


MERGED = {
    "linear": (lambda: nn.Linear(7, 5), (7,)),
    "mlp": (lambda: two_layers(7, 3), (7,)),
    "norm": (lambda: nn.Sequential(nn.Linear(7, 6), nn.GroupNorm(2, 6), nn.GELU(), nn.Linear(6, 2)), (7,)),
    "to-a-number": (lambda: nn.Sequential(nn.Linear(7, 1), nn.Flatten(0)), (7,)),
    "over-time": (lambda: nn.Linear(3, 2), (5, 3)),
}


@sizes
@pytest.mark.parametrize("case", MERGED)
def test_smear(case, num_tokens):
    """Softmax over all experts, https://arxiv.org/abs/2306.03745."""
    make, item_shape = MERGED[case]
    router = make_router("top-k", torch.Size(item_shape).numel(), 4, 4)
    layer = MergedMoE(router, make, 4, item_shape=item_shape, losses={})
    check(layer, [torch.randn(num_tokens, *item_shape)])


CONVOLUTIONS = {
    "plain": partial(nn.Conv2d, 4, 6, 3),
    "strided": partial(nn.Conv2d, 4, 2, 3, stride=2, padding=1, bias=False),
    "depthwise": partial(nn.Conv2d, 4, 4, 3, groups=4, padding=2, dilation=2),
    "network": lambda: nn.Sequential(nn.Conv2d(4, 3, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}


@sizes
@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_cond_conv(case, num_tokens):
    """Sigmoids of a gate over the mean of each channel, https://arxiv.org/abs/1904.04971."""
    router = make_router("top-k-sigmoid", 4, 3, 3)
    layer = MergedMoE(router, CONVOLUTIONS[case], 3, item_shape=(4, 7, 6), losses={})
    x = torch.randn(num_tokens, 4, 7, 6)
    check(layer, [x, x.mean((-2, -1))])


def test_shared_over_images_routed_by_other_features():
    experts = ModuleExperts(lambda: nn.Sequential(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Linear(18, 4)), 3)
    shared = nn.Sequential(nn.Flatten(), nn.Linear(75, 4))
    moe = MoE(make_router("top-k", 6, 3, 2), experts, item_shape=(3, 5, 5), losses={}, shared=shared)
    check(moe, [torch.randn(13, 3, 5, 5), torch.randn(13, 6)])


def random_coefficient(layer):
    """The coefficients start at zero, where they have no gradient to the items."""
    for parameter in layer.coefficient.parameters():
        nn.init.normal_(parameter)
    return layer


def test_residual_of_images_routed_by_other_features():
    experts = ModuleExperts(partial(nn.Conv2d, 3, 2, 3), 3)
    moe = MoE(make_router("top-k", 6, 3, 2), experts, item_shape=(3, 5, 5), losses={})
    layer = random_coefficient(ResidualMixture(moe, nn.Conv2d(3, 2, 3)))
    check(layer, [torch.randn(13, 3, 5, 5), torch.randn(13, 6)])
