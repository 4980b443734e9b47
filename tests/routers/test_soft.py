"""Soft routing: its logits, its groups, and what it does not go with."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import Soft, aux_loss
from gatewright.losses import LOSSES, router_z_loss
from tests.cases import make_soft_moe


def test_directions_decide_and_lengths_do_not():
    router, features = Soft(4, 3, slots_per_expert=2), torch.randn(7, 4)
    expected = router(features)
    with torch.no_grad():
        router.gate.weight *= torch.rand(6, 1) + 1
    scaled = router(features * (torch.rand(7, 1) + 1))
    assert_close(scaled.dispatch, expected.dispatch, rtol=1e-4, atol=1e-6)
    assert_close(scaled.combine, expected.combine, rtol=1e-4, atol=1e-6)


def test_logits_are_cosines_times_the_scale():
    """Two slots at right angles, and tokens along the first, between them, and of no direction at all."""
    router = Soft(2, 2)
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.1]]))
        router.scale.fill_(2.0)
    logits = torch.tensor([[2.0, 0.0], [2**0.5, 2**0.5], [0.0, 0.0]])
    routing = router(torch.tensor([[3.0, 0.0], [7.0, 7.0], [0.0, 0.0]]))
    assert_close(routing.combine[0, :, :, 0], logits.softmax(1), rtol=1e-5, atol=1e-5)
    assert_close(routing.dispatch[0, :, :, 0], logits.softmax(0), rtol=1e-5, atol=1e-5)
    assert_close(router_z_loss(routing.sums), logits.logsumexp(1).square().mean(), rtol=1e-5, atol=1e-5)


def test_a_state_from_when_the_scale_was_a_number_is_taken():
    model = torch.nn.Sequential(Soft(2, 3))
    state = {**model.state_dict(), "0.scale": torch.tensor(5.0)}
    model.load_state_dict(state)
    assert model[0].scale.tolist() == [5.0]
    assert state["0.scale"].shape == ()


def test_extreme_logits_and_tokens_without_a_direction_stay_finite():
    for group_size, scale in product([None, 1, 2], [1e4, -1e4, 0.0]):
        router = Soft(4, 3, group_size=group_size)
        torch.nn.init.constant_(router.scale, scale)
        features = torch.cat([torch.randn(3, 4), torch.zeros(1, 4)]).requires_grad_()
        routing = router(features)
        (routing.dispatch.square().sum() + routing.combine.square().sum()).backward()
        assert_close(routing.dispatch.sum(1), torch.ones_like(routing.dispatch.sum(1)), rtol=0, atol=2e-3)
        for gradient in (features.grad, router.gate.weight.grad, router.scale.grad):
            assert gradient.isfinite().all()


def test_a_group_is_a_run_of_tokens():
    """Groups of 3 are three batches, with the first tokens in the first."""
    router, features = Soft(4, 2, slots_per_expert=2, group_size=3), torch.randn(9, 4)
    whole = Soft(4, 2, slots_per_expert=2)
    whole.load_state_dict(router.state_dict())
    routing = router(features)
    for group in range(3):
        alone = whole(features[3 * group : 3 * group + 3])
        assert_close(routing.dispatch[group], alone.dispatch[0])
        assert_close(routing.combine[group], alone.combine[0])
    assert_close(routing.weight, whole(features).weight)


def test_a_token_of_its_own_goes_everywhere_whole():
    assert torch.equal(Soft(4, 3, group_size=1)(torch.randn(5, 4)).dispatch, torch.ones(5, 1, 3, 1))


def test_a_sequence_is_independent_of_its_batch():
    """Groups of a sequence's length, in a batch of sequences: each is what it is alone."""
    moe = make_soft_moe("soft-groups").eval()
    sequences = torch.randn(4, 3, 8)
    assert_close(moe(sequences)[2], moe(sequences[2]), rtol=0, atol=1e-6)


def test_it_needs_no_losses():
    moe = make_soft_moe()
    assert moe.losses == {}
    moe(torch.randn(5, 8)).sum().backward()
    assert aux_loss(moe) == 0


def test_losses_that_are_wanted_teach_it():
    router = Soft(8, 4)
    sums = router(torch.randn(9, 8)).sums
    for name in ("importance", "load", "load_balance", "router_z"):
        (gradient,) = torch.autograd.grad(LOSSES[name](sums), router.gate.weight, retain_graph=True)
        assert gradient.any(), name


def test_tokens_come_in_whole_groups():
    for num_tokens, group_size in [(10, 4), (1, 2), (3, 2)]:
        message = rf"multiple of group_size \({group_size}\); got {num_tokens}. Pass whole groups"
        with pytest.raises(ValueError, match=message):
            Soft(4, 3, group_size=group_size)(torch.randn(num_tokens, 4))


def test_impossible_sizes_are_refused():
    for sizes, options, message in [
        ((0, 3), {}, "at least 1; got 0, 3 and 3"),
        ((4, 0), {}, "at least 1; got 4, 0 and 0"),
        ((4, 3), {"slots_per_expert": 0}, "slots_per_expert and group_size are at least 1; got 0 and None"),
        ((4, 3), {"group_size": 0}, "slots_per_expert and group_size are at least 1; got 1 and 0"),
    ]:
        with pytest.raises(ValueError, match=message):
            Soft(*sizes, **options)


def test_it_prints_its_sizes():
    text = repr(Soft(6, 5, slots_per_expert=2, group_size=7))
    assert "dim=6, num_experts=5, slots_per_expert=2, group_size=7" in text
