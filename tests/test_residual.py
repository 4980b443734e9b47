"""A mixture beside a dense branch: shapes, shares, and the mixture inside."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import MergedMoE, ModuleExperts, MoE, ResidualMixture, TopK, aux_loss
from tests.cases import make_moe


def images():
    """Images of 3 x 5 x 5 in, 10 numbers out, routed by 4 numbers each."""

    def expert():
        return nn.Sequential(nn.Flatten(), nn.Linear(75, 10))

    moe = MoE(TopK(4, 3, 2), ModuleExperts(expert, 3), item_shape=(3, 5, 5))
    return ResidualMixture(moe, nn.Sequential(nn.Conv2d(3, 2, 5), nn.Flatten(), nn.Linear(2, 10)))


@pytest.mark.parametrize("branch", [None, lambda: nn.Linear(8, 8)], ids=["identity", "dense"])
def test_it_starts_at_half_the_mixture_and_half_the_branch(branch):
    branch = branch and branch()
    layer, x = ResidualMixture(make_moe(), branch), torch.randn(11, 8)
    kept = x if branch is None else branch(x)
    assert_close(layer(x), (layer.moe(x) + kept) / 2)


def test_shares_are_those_of_each_item_and_add_up_to_1():
    layer, x = ResidualMixture(make_moe()), torch.randn(11, 8)
    nn.init.normal_(layer.coefficient.weight)
    shares = layer.shares(x)
    assert_close(shares.sum(1), torch.ones(11))
    assert shares[:, 0].std() > 0.1
    assert_close(layer.shares(x[4:5])[0], shares[4])


@pytest.mark.parametrize("batch", [(5,), (2, 3), (0,), (2, 0)])
def test_leading_dimensions_are_free_and_features_reach_the_router(batch):
    layer, x, features = images(), torch.randn(*batch, 3, 5, 5), torch.randn(*batch, 2, 2)
    output = layer(x, features)
    assert output.shape == (*batch, 10)
    assert_close(layer.moe.routing.sums.probs, layer.moe.router(features.reshape(-1, 4)).sums.probs)
    assert_close(output.reshape(-1, 10), layer(x.flatten(0, -4), features.flatten(0, -3)))


@pytest.mark.parametrize("num_tokens", [0, 1, 11])
def test_every_parameter_gets_a_gradient_and_the_loss_is_found(num_tokens):
    layer, x = ResidualMixture(make_moe("noisy-top-k"), nn.Linear(8, 8)), torch.randn(num_tokens, 8)
    output = layer(x)
    loss = aux_loss(nn.Sequential(layer))
    (output.sum() + loss).backward()
    assert (loss > 0) == (num_tokens > 0)
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert layer.coefficient.weight.grad.any() == (num_tokens > 0)


@pytest.mark.parametrize(("branch", "expected"), [(nn.Linear(8, 8), torch.bfloat16), (None, torch.float32)])
def test_autocast_leaves_the_shares_in_float32(branch, expected):
    """The identity's float32 wins, as it does in any sum."""
    layer, x = ResidualMixture(make_moe(), branch), torch.randn(11, 8)
    nn.init.normal_(layer.coefficient.weight)
    plain, shares = layer(x), layer.shares(x)
    with torch.autocast("cpu", torch.bfloat16):
        output = layer(x)
        assert torch.equal(layer.shares(x), shares)
    assert output.dtype == expected
    assert_close(output.float(), plain, rtol=0.02, atol=0.02)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: ResidualMixture(MoE(TopK(8, 2), ModuleExperts(lambda: nn.Linear(8, 3), 2))),
            r"of the branch are added; for items of shape \(8,\) the experts return \(3,\) and the branch \(Identity\)",
        ),
        (
            lambda: ResidualMixture(MergedMoE(TopK(8, 2), lambda: nn.Linear(8, 8), 2), nn.Linear(8, 3)),
            r"the branch \(Linear\) returns \(3,\). Make them agree",
        ),
        (
            lambda: ResidualMixture(make_moe(), nn.Linear(7, 8)),
            r"The branch \(Linear\) does not take items of shape \(8,\)",
        ),
    ],
)
def test_a_branch_that_does_not_fit_is_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("unchecked")
def test_an_input_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"items of shape \(8,\) behind one or more batch dimensions; got \(4, 7\)"):
        ResidualMixture(make_moe())(torch.zeros(4, 7))
