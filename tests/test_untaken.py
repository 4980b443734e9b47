"""Losses that nobody has taken: how long they wait, and when a backward pass that leaves them out is an error."""

import gc
import weakref

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import aux_loss
from tests.cases import make_moe


@pytest.fixture
def moe():
    return make_moe()


@pytest.fixture
def x():
    return torch.randn(11, 8)


def keeps_one_forward_at_most(compiled):
    moe, x = make_moe(), torch.randn(11, 8)
    model = nn.Sequential(nn.Linear(8, 8), moe.requires_grad_(False))
    run = torch.compile(model, backend="aot_eager") if compiled else model
    for _ in range(5):
        run(x).sum().backward()
    assert len(moe._untaken) <= 1
    run(x)
    assert 0 < aux_loss(model) < 0.02  # of one batch


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_frozen_layer_inside_a_trained_model_keeps_one_forward_at_most(run_unhooked, compiled):
    run_unhooked(keeps_one_forward_at_most, compiled)


def test_a_first_layer_without_gradient_counts_its_last_forward(moe, x):
    moe.requires_grad_(False)
    for _ in range(5):
        moe(x)
    assert len(moe._untaken) == 1
    assert 0 < aux_loss(moe) < 0.02


def test_gradients_of_the_input_alone_leave_nothing_to_the_next_step(moe, x):
    """An adversarial example, and then a step on it."""
    attacked = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(moe(attacked).square().sum(), attacked)
    output = moe(x + 0.1 * slope.sign())
    loss = aux_loss(moe)
    assert_close(loss.detach(), 0.01 * moe.loss_values["load_balance"])
    (output.square().sum() + loss).backward()
    assert moe.router.gate.weight.grad.any()


def test_a_penalty_on_the_inputs_gradient_keeps_the_losses(moe, x):
    """The first backward pass leaves its graph for the second, so the losses are not over."""
    leaf = x.clone().requires_grad_()
    output = moe(leaf)
    (slope,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
    loss = aux_loss(moe)
    assert loss > 0
    (output.sum() + slope.square().sum() + loss).backward()


def test_a_penalty_that_forgets_them_is_an_error(moe, x):
    leaf = x.clone().requires_grad_()
    (slope,) = torch.autograd.grad(moe(leaf).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="auxiliary loss was taken"):
        slope.square().sum().backward()


def test_a_forward_under_way_does_not_disturb_the_backward_of_another(moe, x):
    """As in a pipeline: a second batch goes forward before the first goes back."""
    first = moe(x).sum() + aux_loss(moe)
    second = moe(2 * x).sum()
    first.backward()
    (second + aux_loss(moe)).backward()
    with pytest.raises(RuntimeError, match="auxiliary loss was taken"):
        moe(x).sum().backward()


def test_outputs_that_nobody_holds_do_not_pile_up(moe, x):
    moe(x)
    graph = weakref.ref(moe._untaken[0].sums)
    for _ in range(3):
        moe(x)
    gc.collect()
    assert graph() is None
    assert len(moe._untaken) == 1
