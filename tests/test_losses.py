"""Auxiliary losses as functions of a routing's sums."""

from dataclasses import replace
from itertools import product

import torch
from torch.testing import assert_close

from gatewright import reference
from gatewright.losses import LOSSES, cv_squared, importance_loss, load_balance_loss, load_loss, router_z_loss
from gatewright.routing import top_k_routing


def sums_of(logits, top_k=1):
    top = logits.topk(top_k)
    return top_k_routing(top.indices, top.values.softmax(-1), logits, logits.softmax(-1)).sums


NOTHING = sums_of(torch.zeros(0, 4))


def test_cv_squared_is_the_references():
    for values in [[1.0, 2.0, 3.0], [0.0, 0.0, 8.0], [5.0], [0.0, 0.0], [3.0, 3.0, 3.0], [1e-3, 2e-3], [1e6, 3e6]]:
        values = torch.tensor(values)
        assert_close(cv_squared(values), reference.cv_squared(values))


def test_cv_squared_has_a_finite_gradient_in_the_corners():
    for values in [[0.0, 0.0, 0.0], [4.0], [1.0, 1.0]]:
        values = torch.tensor(values, requires_grad=True)
        cv_squared(values).backward()
        assert_close(values.grad, torch.zeros_like(values))


def test_importance_and_load_read_their_own_sums():
    for loss, field in [(importance_loss, "importance"), (load_loss, "load")]:
        values = torch.tensor([3.0, 1.0, 0.0, 2.0])
        assert_close(loss(replace(NOTHING, **{field: values})), reference.cv_squared(values))


def test_switch_loss_is_exactly_1_for_an_even_load():
    """Every expert chosen equally often: 1, whatever the probabilities sum to, since the shares are all equal."""
    for top_k, num_experts in product([1, 2, 3], [3, 8]):
        logits = torch.stack([torch.arange(float(num_experts)).roll(i) for i in range(num_experts)])
        assert_close(load_balance_loss(sums_of(logits, top_k)), torch.tensor(1.0))


def test_switch_loss_is_the_number_of_experts_when_one_takes_all_with_certainty():
    for num_experts in [2, 8]:
        logits = torch.full((6, num_experts), -1e4)
        logits[:, 1] = 1e4
        assert load_balance_loss(sums_of(logits)) == num_experts


def test_switch_loss_by_hand():
    """E = 2, three tokens: shares 2/3 and 1/3, probabilities (3/4, 3/4, 1/4) of the first expert."""
    probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75]])
    expected = 2 * (2 / 3 * 1.75 / 3 + 1 / 3 * 1.25 / 3)
    assert_close(load_balance_loss(sums_of(probs.log())), torch.tensor(expected))


def test_switch_loss_counts_dropped_assignments_too():
    probs = torch.tensor([[0.75, 0.25], [0.75, 0.25], [0.25, 0.75]])
    top = probs.topk(1)
    routing = top_k_routing(top.indices, top.values, probs.log(), probs)
    dropped = routing.drop(torch.tensor([False, True, False]))
    assert load_balance_loss(dropped.sums) == load_balance_loss(routing.sums)


def test_switch_loss_holds_the_shares_constant():
    counts, probs = torch.tensor([2.0, 1.0, 0.0, 0.0], requires_grad=True), torch.full((4,), 0.75, requires_grad=True)
    load_balance_loss(replace(NOTHING, num_tokens=torch.tensor(3), tokens_per_expert=counts, probs=probs)).backward()
    assert counts.grad is None
    assert_close(probs.grad, 4 / 3 * torch.tensor([2 / 3, 1 / 3, 0, 0]))


def test_z_loss_by_hand():
    logits = torch.tensor([[1.0, 2.0, 4.0], [0.5, 0.25, 0.25]]).log()
    assert_close(router_z_loss(sums_of(logits)), torch.tensor(7.0).log() ** 2 / 2)  # log 7, and log 1 = 0


def test_no_tokens_cost_nothing():
    for name in LOSSES:
        assert LOSSES[name](NOTHING) == 0


def test_mean_losses_do_not_depend_on_how_often_the_batch_is_repeated():
    for name in ["load_balance", "router_z"]:
        logits = torch.randn(5, 4)
        assert_close(LOSSES[name](sums_of(logits.repeat(7, 1))), LOSSES[name](sums_of(logits)))
