"""A shared expert: added for every item, whatever became of it among the routed ones."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import Capacity, GroupedFeedForward, MoE, Soft, SoftMoE, TopK
from tests.cases import make_router, two_layers


def with_shared(router="noisy-top-k", **options):
    return MoE(make_router(router, 8, 5, 2), GroupedFeedForward(5, 8, 4), shared=two_layers(8, 3), **options)


def without_shared(moe):
    twin = copy.deepcopy(moe)
    twin.shared = None
    return twin


@pytest.mark.parametrize("batch", [(11,), (2, 3), (1,), (0,)])
def test_it_is_added_to_the_mixture(batch):
    moe, x = with_shared("top-k"), torch.randn(*batch, 8)
    assert_close(moe(x), without_shared(moe)(x) + moe.shared(x))


def test_a_token_whose_assignments_were_all_dropped_still_gets_it():
    moe, x = with_shared("top-k", dispatcher=Capacity(0.2, 1)), torch.randn(40, 8)
    output, shared = moe(x), moe.shared(x)
    served = moe.routing.token_index[moe.routing.expert_index < 5]
    lost = torch.ones(40, dtype=torch.bool).index_fill(0, served, False)
    assert 0 < lost.sum() < 40
    assert_close(output[lost], shared[lost])
    assert not torch.isclose(output[~lost], shared[~lost]).all(-1).any()


def test_soft_mixtures_take_one_too():
    moe, x = SoftMoE(Soft(8, 3), GroupedFeedForward(3, 8, 4), shared=nn.Linear(8, 8)), torch.randn(9, 8)
    assert_close(moe(x), without_shared(moe)(x) + moe.shared(x))


def test_forgetting_the_loss_fails_where_only_the_shared_expert_learns():
    moe = with_shared()
    moe.requires_grad_(False)
    moe.shared.requires_grad_(True)
    moe = copy.deepcopy(moe)
    with pytest.raises(RuntimeError, match="auxiliary loss was taken"):
        moe(torch.randn(11, 8)).sum().backward()


@pytest.mark.parametrize(
    ("shared", "message"),
    [
        (nn.Linear(8, 7), r"experts return \(8,\) and the shared expert \(Linear\) returns \(7,\). Make them agree"),
        (nn.Linear(7, 8), r"The shared expert \(Linear\) does not take items of shape \(8,\)"),
        (nn.Flatten(0), r"for 2 rows of shape \(8,\), the shared expert \(Flatten\) returns \(16,\)"),
    ],
)
def test_one_that_does_not_fit_is_refused_at_construction(shared, message):
    with pytest.raises(ValueError, match=message):
        MoE(TopK(8, 3), GroupedFeedForward(3, 8, 4), shared=shared)
