"""Group-limited routing against the reference: DeepSeek-V2's and V3's, and what groups forbid."""

import warnings
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import GroupedFeedForward, GroupLimited, MoE, reference
from gatewright.routers.group_limited import within_best_groups
from tests.cases import dense_weights

V2 = {"score": "softmax", "group_score": "max", "normalize": False, "scale": 16.0, "bias_rate": 0.0}
V3 = {"score": "sigmoid", "group_score": "two-largest", "normalize": True, "scale": 2.5}
OTHERS = [
    {"score": "softmax", "group_score": "two-largest", "normalize": True},
    {"score": "sigmoid", "group_score": "max", "normalize": False},
]
SIZES = [  # num_experts, num_groups, top_k_groups, top_k
    (8, 4, 2, 3),
    (12, 3, 2, 5),
    (6, 3, 1, 2),
    (6, 2, 2, 5),
    (6, 2, 1, 3),
    (5, 5, 3, 2),
    (4, 1, 1, 2),
    (9, 3, 2, 1),
    (1, 1, 1, 1),
]


def make(num_experts, num_groups, top_k_groups, top_k, *, bias=0.2, **options):
    """A router in float64 whose bias matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        router = GroupLimited(4, num_experts, top_k, num_groups=num_groups, top_k_groups=top_k_groups, **options)
    torch.nn.init.normal_(router.gate.weight)
    torch.nn.init.normal_(router.expert_bias.bias, std=bias)
    return router.double()


@pytest.mark.parametrize("variant", [V2, V3, *OTHERS], ids=["v2", "v3", "softmax-two-largest", "sigmoid-max"])
def test_every_variant_is_the_references(variant):
    """Weights, and gradients of the gate; V2 has no bias."""
    for (num_experts, num_groups, top_k_groups, top_k), num_tokens in product(SIZES, [1, 33]):
        router = make(num_experts, num_groups, top_k_groups, top_k, bias=0.0 if variant is V2 else 0.2, **variant)
        features = torch.randn(num_tokens, 4, dtype=torch.float64)
        upstream = torch.randn(num_tokens, num_experts, dtype=torch.float64)
        settings = {name: value for name, value in variant.items() if name != "bias_rate"}
        weights = dense_weights(router(features))
        expected = reference.group_limited(
            features @ router.gate.weight.t(),
            router.expert_bias.bias,
            top_k,
            num_groups=num_groups,
            top_k_groups=top_k_groups,
            **settings,
        )
        assert_close(weights, expected, rtol=0, atol=1e-12)
        gradients = [torch.autograd.grad((table * upstream).sum(), router.gate.weight) for table in (weights, expected)]
        assert_close(*gradients, rtol=0, atol=1e-10)


def test_the_mask_by_hand():
    """Two largest: 7, 6, 8; largest: 4, 6, 5."""
    scores = torch.tensor([[4.0, 3.0, -9.0, 0.0, 6.0, 0.0, 5.0, 3.0, 3.0]])
    n = -torch.inf
    assert within_best_groups(scores, 3, 1, "two-largest").tolist() == [[n, n, n, n, n, n, 5.0, 3.0, 3.0]]
    assert within_best_groups(scores, 3, 2, "two-largest").tolist() == [[4.0, 3.0, -9.0, n, n, n, 5.0, 3.0, 3.0]]
    assert within_best_groups(scores, 3, 2, "max").tolist() == [[n, n, n, 0.0, 6.0, 0.0, 5.0, 3.0, 3.0]]
    assert within_best_groups(scores, 3, 3, "max").tolist() == scores.tolist()


def test_of_equal_scores_the_first_groups_and_experts_are_chosen():
    for group_score in ["max", "two-largest"]:
        router = GroupLimited(4, 64, 3, num_groups=32, top_k_groups=2, group_score=group_score)
        torch.nn.init.zeros_(router.gate.weight)
        assert router(torch.randn(5, 4)).expert_index.view(3, 5).t().tolist() == [[0, 1, 2]] * 5
        router.expert_bias.bias[[41, 61]] = 0.25  # groups 20 and 30
        assert router(torch.randn(5, 4)).expert_index.view(3, 5).t().tolist() == [[41, 61, 40]] * 5


def test_the_default_loss_is_deepseek_v3s():
    moe = MoE(GroupLimited(8, 6), GroupedFeedForward(6, 8, 8))
    assert moe.losses == {"load_balance": 0.0001}


@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_refused():
    for setting, message in [
        ({"num_groups": 4}, "num_groups must divide num_experts into groups of equal size; got 4 groups of 6 experts"),
        ({"num_groups": 0}, "num_groups must divide num_experts into groups of equal size; got 0 groups of 6 experts"),
        ({"num_groups": 3, "top_k_groups": 4}, r"top_k_groups is from 1 to num_groups \(3\); got 4"),
        ({"num_groups": 3, "top_k_groups": 0}, r"top_k_groups is from 1 to num_groups \(3\); got 0"),
        (
            {"num_groups": 3, "top_k_groups": 1},
            r"top_k \(3\) experts must find room in top_k_groups \(1\) groups of 2 experts. Use top_k of at most 2",
        ),
        ({"group_score": "mean"}, "group_score is 'max' or 'two-largest'; got 'mean'"),
    ]:
        with pytest.raises(ValueError, match=message):
            GroupLimited(4, 6, 3, **setting)
