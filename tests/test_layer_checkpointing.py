"""Layers under activation checkpointing, where the forward runs a second time inside backward."""

import copy
from functools import partial

import pytest
import torch
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from gatewright import ExpertDropout, GroupedFeedForward, ModuleExperts, MoE, NoisyTopK, aux_loss, seed_noise
from gatewright.losses import LOSSES
from tests import compare
from tests.cases import make_moe

X = torch.randn(21, 8, generator=torch.Generator().manual_seed(3))


def step(model, x, run):
    return compare.step(partial(run, model), model, x)


def plainly(model, x):
    return model(x)


def checkpointed(model, x):
    return checkpoint(model, x, use_reentrant=False)


def each_part_checkpointed(model, x):
    for part in model:
        x = checkpoint(part, x, use_reentrant=False)
    return x


def nested(model, x):
    return checkpoint(each_part_checkpointed, model, x, use_reentrant=False)


@pytest.mark.parametrize("run", [checkpointed, each_part_checkpointed, nested])
@pytest.mark.parametrize(
    ("experts", "dispatcher"), [("grouped-feed-forward", "dropless"), ("modules", "capacity-tight")]
)
def test_gradients_are_those_of_a_plain_step(run, experts, dispatcher):
    """The noise of two noisy layers included: torch gives the second forward the random state of the first."""
    layers = [
        make_moe("noisy-top-k", experts, dispatcher),
        nn.Linear(8, 8),
        make_moe("noisy-top-k", experts, dispatcher),
    ]
    model = nn.Sequential(*layers)
    expected, actual = step(model, X, plainly), step(model, X, run)
    assert actual.keys() == expected.keys()
    for name, value in actual.items():
        assert_close(value, expected[name], rtol=1e-5, atol=1e-6, msg=name)


def test_the_second_forward_records_nothing():
    moe = make_moe("noisy-top-k")
    output = checkpointed(moe, X.clone().requires_grad_())
    routing, loss = moe.routing, aux_loss(moe)
    (output.sum() + loss).backward()
    assert moe.routing is routing
    assert aux_loss(moe) == 0
    assert_close(loss.detach(), sum(0.1 * LOSSES[name](routing.sums) for name in ("importance", "load")))


def test_batch_norm_on_one_row_uses_running_statistics_both_times():
    def expert():
        return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 8))

    moe = MoE(NoisyTopK(8, 3), ModuleExperts(expert, 3))
    expected, actual = (step(copy.deepcopy(moe), X[:1], run) for run in (plainly, checkpointed))
    for name, value in actual.items():
        assert_close(value, expected[name], msg=name)


REENTRANT = "Pass use_reentrant=False to torch.utils.checkpoint.checkpoint"


def test_reentrant_checkpointing_is_refused_when_the_loss_is_taken():
    moe = make_moe()
    checkpoint(moe, X.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=REENTRANT):
        aux_loss(moe)


def test_reentrant_checkpointing_is_refused_in_backward():
    output = checkpoint(make_moe(), X.clone().requires_grad_(), use_reentrant=True)
    with pytest.raises(RuntimeError, match=REENTRANT):
        output.sum().backward()


def test_without_losses_reentrant_checkpointing_is_no_concern():
    moe = make_moe("noisy-top-k")
    moe.losses.clear()
    expected = step(moe, X, plainly)
    for name, value in step(moe, X, lambda model, x: checkpoint(model, x, use_reentrant=True)).items():
        assert_close(value, expected[name], msg=name)


def two_keyed_forwards(run, twice=False):
    """Gradients of two forwards with noise of their own, and one backward."""
    torch.manual_seed(0)
    moe = MoE(ExpertDropout(NoisyTopK(8, 4), 0.2), GroupedFeedForward(4, 8, 16))
    nn.init.normal_(moe.router.router.gate.weight)
    total = torch.zeros(())
    for step_index in range(2):
        seed_noise(moe, 0, step_index)
        output = run(moe, X)
        output = run(moe, output) if twice else output
        total = total + output.square().sum() + aux_loss(moe)
    total.backward()
    return {name: parameter.grad for name, parameter in moe.named_parameters()}


@pytest.mark.parametrize("twice", [False, True], ids=["once", "twice in a forward"])
def test_a_forward_keeps_its_noise_when_it_runs_again(twice):
    assert_close(two_keyed_forwards(checkpointed, twice), two_keyed_forwards(plainly, twice))


def test_noise_that_cannot_be_found_again_is_an_error():
    def without_generator(model, x):
        return checkpoint(model, x, use_reentrant=False, preserve_rng_state=False)

    with pytest.raises(RuntimeError, match="preserve_rng_state=True"):
        two_keyed_forwards(without_generator)
