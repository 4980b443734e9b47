"""Noisy top-k gating against the reference, and its load against frequencies."""

import math
from itertools import product

import torch
from torch.nn.functional import softplus
from torch.testing import assert_close

from gatewright import BatchScope, NoisyTopK, reference
from gatewright.losses import importance_loss, load_loss
from gatewright.routers import load_probability
from tests.cases import make_router
from tests.references import reference_gates

SEED = 1


def parts(router, features):
    """Clean logits, deviations and the noise that the router draws after `torch.manual_seed(SEED)`."""
    logits, noise_std = features @ router.gate.weight.t(), softplus(features @ router.noise.weight.t())
    torch.manual_seed(SEED)
    return logits, noise_std, BatchScope().normal(logits)


def route(router, features):
    torch.manual_seed(SEED)
    return router(features)


def test_load_probability_is_how_often_an_expert_is_kept_under_fresh_noise():
    """Eq. 8: one component's noise is drawn again, the others stay. Within 5 standard errors, 5 counts near 0 and 1."""
    for top_k, num_experts in product([1, 2, 4], [4, 16, 40]):
        draws = 10_000
        logits, noise_std = torch.randn(num_experts), 0.3 + torch.rand(num_experts)
        noisy = logits + noise_std * torch.randn(num_experts)
        probability = load_probability(logits[None], noisy[None], noise_std[None], top_k)[0].double()
        for expert in range(num_experts):
            fresh = noisy.repeat(draws, 1)
            fresh[:, expert] = logits[expert] + noise_std[expert] * torch.randn(draws)
            frequency = (fresh.topk(top_k).indices == expert).double().sum() / draws
            standard_error = (probability[expert] * (1 - probability[expert]) / draws).sqrt()
            assert (frequency - probability[expert]).abs() <= 5 * standard_error + 5 / draws


def test_training_is_the_references():
    for num_experts, top_k in [(5, 1), (5, 2), (5, 4), (5, 5), (2, 1), (1, 1)]:
        router = make_router("noisy-top-k", 6, num_experts, top_k).double()
        features = torch.randn(21, 6, dtype=torch.float64)
        logits, noise_std, noise = parts(router, features)
        gates = reference.noisy_top_k(logits, noise_std, noise, top_k)
        load = reference.load_probability(logits, noise_std, noise, top_k)
        sums = route(router, features).sums
        assert_close(sums.importance, gates.sum(0), rtol=0, atol=1e-12)
        assert_close(sums.load, load.sum(0), rtol=0, atol=1e-12)
        assert_close(importance_loss(sums), reference.cv_squared(gates.sum(0)), rtol=0, atol=1e-12)
        assert_close(load_loss(sums), reference.cv_squared(load.sum(0)), rtol=0, atol=1e-12)


def test_other_statistics_are_those_of_the_clean_logits():
    router, features = make_router("noisy-top-k", 6, 5, 2), torch.randn(21, 6)
    logits, _, _ = parts(router, features)
    sums = route(router, features).sums
    assert_close(sums.probs, logits.softmax(-1).sum(0))
    assert_close(sums.router_z, logits.logsumexp(-1).square().sum())
    assert_close(sums.entropy, torch.special.entr(logits.softmax(-1)).sum())


def test_gradients_of_the_losses_are_the_references():
    for loss, top_k in product([importance_loss, load_loss], [1, 2, 4]):
        router = make_router("noisy-top-k", 6, 5, top_k).double()
        features = torch.randn(21, 6, dtype=torch.float64)
        logits, noise_std, noise = parts(router, features)
        name = "noisy_top_k" if loss is importance_loss else "load_probability"
        expected = reference.cv_squared(getattr(reference, name)(logits, noise_std, noise, top_k).sum(0))
        parameters = [router.gate.weight, router.noise.weight]
        for actual, wanted in zip(
            torch.autograd.grad(loss(route(router, features).sums), parameters),
            torch.autograd.grad(expected, parameters),
            strict=True,
        ):
            assert_close(actual, wanted, rtol=0, atol=1e-12)
            if loss is load_loss or top_k > 1:  # one weight is always 1
                assert wanted.abs().max() > 1e-3


def test_a_fresh_gate_takes_the_first_experts_in_evaluation():
    """All its logits are 0: the reference says who is first of equal ones."""
    for num_experts in [8, 40]:
        router, features = NoisyTopK(6, num_experts).eval(), torch.randn(5, 6)
        assert router(features).expert_index.tolist() == [0] * 5 + [1] * 5
        assert_close(router(features).sums.importance, reference_gates(router, features).sum(0))


def test_the_first_batches_are_routed_evenly():
    """At step 0 every expert has the same chance of top_k / experts per token: within 5 standard errors."""
    for num_experts, top_k in [(4, 1), (16, 2), (40, 4)]:
        num_tokens = 4000
        sums = make_zero_router(num_experts, top_k)(torch.randn(num_tokens, 6)).sums
        chance = top_k / num_experts
        bound = 5 * math.sqrt(chance * (1 - chance) / num_tokens)
        for values in (sums.tokens_per_expert, sums.load, sums.importance * top_k):
            assert (values / num_tokens - chance).abs().max() < bound


def make_zero_router(num_experts, top_k):
    router = make_router("noisy-top-k", 6, num_experts, top_k)
    torch.nn.init.zeros_(router.gate.weight)
    torch.nn.init.zeros_(router.noise.weight)
    return router


def test_from_zero_the_losses_and_the_task_move_the_gate():
    router = make_zero_router(5, 2)
    for value in (
        load_loss(route(router, torch.randn(30, 6)).sums),
        route(router, torch.randn(30, 6)).weight[:30].sum(),
    ):
        gradient, noise_gradient = torch.autograd.grad(value, [router.gate.weight, router.noise.weight])
        assert gradient.abs().max() > 1e-3
        assert noise_gradient.abs().max() > 1e-3


def test_extreme_noise_stays_finite():
    """Without a floor under the deviation the gradient of the load is NaN where it is 0."""
    for noise in [-1e4, 0.0, 1e4]:
        router, features = make_router("noisy-top-k", 1, 4, 2), torch.ones(8, 1)
        torch.nn.init.constant_(router.noise.weight, noise)
        routing = route(router, features)
        (routing.weight[:8].sum() + load_loss(routing.sums)).backward()
        assert routing.weight.isfinite().all()
        assert router.gate.weight.grad.isfinite().all()
        assert router.noise.weight.grad.isfinite().all()
        if noise < 0:  # next to no noise: the load is the count
            assert_close(routing.sums.load, routing.sums.tokens_per_expert.float())


def test_where_there_is_nothing_to_balance_the_load_loss_is_0():
    for num_experts, top_k, num_tokens in [(1, 1, 9), (4, 4, 9), (4, 2, 0)]:
        sums = make_router("noisy-top-k", 6, num_experts, top_k)(torch.randn(num_tokens, 6)).sums
        assert load_loss(sums) == 0
        assert_close(sums.load, torch.full((num_experts,), float(num_tokens) if top_k == num_experts else 0.0))
