"""Biased top-k against the reference, and the balance that it is for."""

import warnings
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import Biased, GroupedFeedForward, GroupLimited, MoE, end_step, reference
from gatewright.metrics import max_over_mean_load
from tests.cases import dense_weights

VARIANTS = [
    {"score": score, "normalize": normalize, "scale": scale}
    for score in ("softmax", "sigmoid", "sqrt_softplus")
    for normalize in (False, True)
    for scale in (1.0, 2.5)
]


def make(num_experts, top_k, **options):
    """A router in float64 whose bias matters."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        router = Biased(4, num_experts, top_k, **options).double()
    torch.nn.init.normal_(router.gate.weight)
    torch.nn.init.normal_(router.expert_bias.bias, std=0.3)
    return router


def test_every_variant_is_the_references():
    for variant, (num_experts, top_k), num_tokens in product(
        VARIANTS, [(6, 1), (6, 2), (7, 5), (3, 3), (1, 1)], [1, 21]
    ):
        router, features = make(num_experts, top_k, **variant), torch.randn(num_tokens, 4, dtype=torch.float64)
        upstream = torch.randn(num_tokens, num_experts, dtype=torch.float64)
        weights = dense_weights(router(features))
        expected = reference.group_limited(features @ router.gate.weight.t(), router.expert_bias.bias, top_k, **variant)
        assert_close(weights, expected, rtol=0, atol=1e-12)
        gradients = [torch.autograd.grad((table * upstream).sum(), router.gate.weight) for table in (weights, expected)]
        assert_close(*gradients, rtol=0, atol=1e-11)


def test_the_bias_chooses_and_does_not_weigh():
    router, features = make(6, 2, normalize=False), torch.randn(21, 4, dtype=torch.float64)
    router.expert_bias.bias.copy_(torch.tensor([0.0, 0.0, 5.0, 0.0, 9.0, -3.0]))
    routing = router(features)
    assert routing.expert_index.tolist() == [4] * 21 + [2] * 21  # in the order of the biased scores
    scores = (features @ router.gate.weight.t()).sigmoid()
    assert_close(routing.weight, torch.cat([scores[:, 4], scores[:, 2]]))
    assert_close(routing.sums.probs, (scores / scores.sum(-1, keepdim=True)).sum(0))  # nor does it sway the losses


def test_of_equal_scores_the_first_experts_are_chosen():
    router = Biased(4, 64, 3)
    torch.nn.init.zeros_(router.gate.weight)
    assert router(torch.randn(5, 4)).expert_index.view(3, 5).t().tolist() == [[0, 1, 2]] * 5
    router.expert_bias.bias[[60, 40]] = 0.25
    assert router(torch.randn(5, 4)).expert_index.view(3, 5).t().tolist() == [[40, 60, 0]] * 5


def loads_over_training(make_router, options):
    """The largest load over the mean, by routes of tokens never seen: before and after steps of two micro-batches."""
    torch.manual_seed(0)
    moe = MoE(make_router(8, 8, 2, bias_rate=0.005, **options), GroupedFeedForward(8, 8, 8), losses={})
    torch.nn.init.normal_(moe.router.gate.weight, std=0.5)
    with torch.no_grad():  # The first feature is 1: some experts are chosen much more often than others.
        moe.router.gate.weight[:, 0] = torch.linspace(-3, 3, 8)

    def route(num_tokens):
        return moe.router(torch.randn(num_tokens, 8).index_fill(1, torch.tensor(0), 1.0))

    loads = [float(max_over_mean_load(route(5000).sums))]
    for _ in range(300):
        moe.record(route(256), torch.zeros(1))
        moe.record(route(256), torch.zeros(1))
        end_step(moe)
    return [*loads, float(max_over_mean_load(route(5000).sums))]


@pytest.mark.parametrize(
    ("make_router", "options"),
    [
        (Biased, {}),
        (GroupLimited, {"num_groups": 4, "top_k_groups": 2}),
        (GroupLimited, {"num_groups": 2, "top_k_groups": 1, "group_score": "max"}),
    ],
    ids=["biased", "groups", "one-of-two-groups"],
)
def test_steps_even_out_a_skewed_load(run_unhooked, make_router, options):
    before, after = run_unhooked(loads_over_training, make_router, options)
    assert before > 2.5
    assert after < 1.15


@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_refused():
    for make_router, (setting, message) in product(
        [Biased, GroupLimited],
        [
            ({"score": "softmin"}, "score is 'softmax', 'sigmoid' or 'sqrt_softplus'; got 'softmin'"),
            ({"scale": 0.0}, "scale is finite and above 0; got 0.0"),
            ({"scale": float("inf")}, "scale is finite and above 0; got inf"),
            ({"scale": float("nan")}, "scale is finite and above 0; got nan"),
        ],
    ):
        with pytest.raises(ValueError, match=message):
            make_router(4, 3, 2, **setting)
