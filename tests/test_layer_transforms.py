"""Derivatives of second order and in forward mode, and `torch.func`: the numbers of the loops, or of plain autograd."""

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jvp, vmap
from torch.testing import assert_close

from gatewright import Biased, GroupedFeedForward, ModuleExperts, MoE, TopK, aux_loss
from tests.cases import ROUTER_CLASSES, SOFT_CASES, keys_of, make_merged, make_moe, make_soft_moe
from tests.compare import SEED, arguments, by_the_layer, by_the_reference

# Torch's own derivatives in forward mode are written in it.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated:DeprecationWarning")

LAYERS = {
    **{f"grouped-{router}": (make_moe, router, "grouped-swiglu-bias") for router in ROUTER_CLASSES},
    **{f"modules-{router}": (make_moe, router, "modules") for router in ("noisy-top-k", "expert-choice")},
    **{f"grouped-{router}": (make_soft_moe, router, "grouped-feed-forward") for router in SOFT_CASES},
    "modules-soft": (make_soft_moe, "soft", "modules"),
    "merged": (make_merged, "top-k"),
}


def make(case, dtype=torch.float64):
    """A layer without losses, which has an expert that no token chooses."""
    torch.manual_seed(3)
    build, *parts = LAYERS[case]
    layer = build(*parts).to(dtype)
    layer.losses.clear()
    return layer, torch.randn(6, 8, dtype=dtype)


@pytest.mark.parametrize("case", LAYERS)
def test_second_derivatives_are_the_references(case):
    """A gradient penalty's gradient, in training."""
    layer, x = make(case)
    penalties = []
    for compute in (by_the_layer, by_the_reference):
        leaves = [x.clone().requires_grad_(), *layer.parameters()]
        torch.manual_seed(SEED)
        output = compute(layer, leaves[0], keys_of(x) if len(arguments(layer, x)) > 1 else None)
        (slope,) = torch.autograd.grad(output.pow(3).sum(), leaves[0], create_graph=True)
        found = torch.autograd.grad(slope.square().sum(), leaves, allow_unused=True, materialize_grads=True)
        penalties.append(found)
    assert_close(*penalties)


def test_float32_grouped_experts_have_second_derivatives_too():
    """Where torch's own grouped GEMM runs."""
    layer, x = make("grouped-top-k", torch.float32)
    wide, _ = make("grouped-top-k")
    found = torch.autograd.functional.hessian(lambda x: layer(x).pow(3).sum(), x)
    assert_close(found.double(), torch.autograd.functional.hessian(lambda x: wide(x).pow(3).sum(), x.double()))


@pytest.mark.parametrize("case", LAYERS)
def test_functional_transforms_agree_with_autograd(case):
    layer, x = make(case)
    inputs, parameters = arguments(layer, x), dict(layer.named_parameters())

    def loss(parameters, x):
        torch.manual_seed(SEED)
        return functional_call(layer, parameters, (x, *inputs[1:])).pow(3).sum()

    expected = torch.autograd.grad(loss(parameters, x), parameters.values(), allow_unused=True, materialize_grads=True)
    assert_close(tuple(grad(loss)(parameters, x).values()), expected)
    direction = torch.randn_like(x)
    _, forward = jvp(lambda x: loss(parameters, x), (x,), (direction,))
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(parameters, leaf), leaf, materialize_grads=True)
    assert_close(forward, (slope * direction).sum())
    with forward_ad.dual_level():
        dual = forward_ad.unpack_dual(loss(parameters, forward_ad.make_dual(x, direction)))
        assert_close(dual.tangent, forward)


@pytest.mark.parametrize("case", LAYERS)
def test_vmap_agrees_with_a_loop(case):
    layer, _ = make(case)
    layer.eval()
    batches = torch.randn(3, 6, 8, dtype=torch.float64)
    several = [torch.stack(parts) for parts in zip(*(arguments(layer, batch) for batch in batches), strict=True)]
    assert_close(vmap(layer)(*several), torch.stack([layer(*arguments(layer, batch)) for batch in batches]))


def test_losses_are_taken_inside_a_transform_and_nothing_stays_behind():
    moe = MoE(Biased(8, 4), GroupedFeedForward(4, 8, 16), losses={"load_balance": 0.5})
    parameters, x = dict(moe.named_parameters()), torch.randn(6, 8)

    def loss(parameters):
        return functional_call(moe, parameters, (x,)).square().sum() + aux_loss(moe)

    found = grad(loss)(parameters)
    assert moe.router.expert_bias.load.sum() == 12
    expected = torch.autograd.grad(loss(parameters), parameters.values())
    assert_close(tuple(found.values()), expected)
    grad(lambda parameters: functional_call(moe, parameters, (x,)).sum())(parameters)
    assert aux_loss(moe) == 0
    assert moe.routing is None


def test_batch_norm_in_training_is_refused_where_rows_cannot_be_told_apart():
    experts = ModuleExperts(lambda: nn.BatchNorm1d(8, track_running_stats=False), 3)
    moe = MoE(TopK(8, 3), experts, losses={})
    with pytest.raises(RuntimeError, match="GroupNorm"):
        vmap(moe)(torch.randn(2, 5, 8))
