"""Auxiliary losses of layers in a model: counted once, per backward, and never forgotten in silence."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import GroupedFeedForward, ModuleExperts, MoE, NoisyTopK, Router, TopK, aux_loss
from gatewright.losses import LOSSES
from gatewright.routing import top_k_routing
from tests.cases import make_moe, make_router


@pytest.fixture
def moe():
    return make_moe()


@pytest.fixture
def x():
    return torch.randn(11, 8)


def test_it_is_the_sum_of_coefficient_times_loss(x):
    coefficients = {"importance": 0.5, "load": 0.25, "load_balance": 2.0, "router_z": 0.125}
    moe = MoE(make_router("noisy-top-k", 8, 3, 2), GroupedFeedForward(3, 8, 4), losses=coefficients)
    moe(x)
    sums = moe.routing.sums
    each = {name: LOSSES[name](sums) for name in coefficients}
    assert_close(aux_loss(moe), sum(coefficients[name] * value for name, value in each.items()))
    assert_close(moe.loss_values, each)
    assert not any(value.requires_grad for value in moe.loss_values.values())


def test_it_adds_up_the_layers_of_a_model(x):
    model = nn.Sequential(make_moe(), nn.Linear(8, 8), make_moe("noisy-top-k"))
    model(x)
    one, other = copy.deepcopy(model[0]), copy.deepcopy(model[2])
    assert aux_loss(one) == aux_loss(other) == 0  # copies have seen no batch
    total = aux_loss(model)
    expected = 0.01 * model[0].loss_values["load_balance"] + 0.1 * sum(model[2].loss_values.values())
    assert_close(total, expected)
    assert total > 0


def test_a_layer_used_twice_counts_twice(moe, x):
    moe(x)
    once = aux_loss(moe)
    outputs = moe(x), moe(2 * x)
    first, second = (LOSSES["load_balance"](moe.router(value).sums) for value in (x, 2 * x))
    total = aux_loss(moe)
    assert_close(total, 0.01 * (first + second))
    assert_close(once, 0.01 * first)
    (total + sum(output.sum() for output in outputs)).backward()
    assert moe.router.gate.weight.grad.any()


@pytest.mark.parametrize(
    "clone", [lambda moe: moe, copy.deepcopy, copy.copy, lambda moe: pickle.loads(pickle.dumps(moe))]
)
def test_forgetting_it_fails_in_backward(clone, moe, x):
    moe = clone(moe)
    with pytest.raises(RuntimeError, match=r"loss = task_loss \+ gatewright.aux_loss\(model\)"):
        moe(x).sum().backward()


def test_forgetting_one_layer_of_two_fails(x):
    model = nn.Sequential(make_moe(), make_moe())
    loss = model(x).sum()
    with pytest.raises(RuntimeError, match="backward ran before this MoE layer's auxiliary loss was taken"):
        (loss + aux_loss(model[0])).backward()


@pytest.mark.parametrize("clone", [lambda moe: moe, copy.deepcopy])
def test_forgetting_it_fails_where_only_the_experts_learn(clone, x):
    moe = make_moe()
    moe.router.requires_grad_(False)
    moe = clone(moe)
    with pytest.raises(RuntimeError, match="auxiliary loss"):
        moe(x).sum().backward()


def test_a_backward_that_does_not_pass_the_layer_is_no_concern(moe, x):
    moe(x)
    other = nn.Linear(8, 1)
    other(x).sum().backward()
    assert other.weight.grad.any()


def test_a_layer_that_is_gone_watches_no_longer(x):
    experts = GroupedFeedForward(3, 8, 4)
    moe = MoE(TopK(8, 3, 2), experts)
    moe(x)
    del moe
    experts(x, torch.tensor([4, 4, 3])).sum().backward()
    assert experts.weight_in.grad.any()


def test_no_losses_never_complain(x):
    moe = MoE(NoisyTopK(8, 3), GroupedFeedForward(3, 8, 4), losses={})
    moe(x).sum().backward()
    assert aux_loss(moe) == 0
    with torch.no_grad():
        moe(x)
    assert aux_loss(moe) == 0


def test_evaluation_between_training_steps_leaves_no_trace(moe, x):
    moe(x)
    expected = aux_loss(moe)
    moe(x)
    moe.eval()
    moe(2 * x)
    moe(3 * x).sum()
    moe.train()
    assert_close(aux_loss(moe), expected)
    assert moe.routing.sums.num_tokens == 11
    moe.eval()
    moe(x).sum().backward()  # as a saliency map would: nothing was forgotten
    assert aux_loss(moe) == 0


def test_training_without_gradients_loses_the_loss_and_says_so(moe, x):
    with torch.no_grad():
        moe(x)
    with pytest.raises(RuntimeError, match=r"under torch.no_grad\(\), or under reentrant activation checkpointing"):
        aux_loss(moe)
    moe(x)
    assert aux_loss(moe) > 0


def test_a_frozen_router_has_a_loss_without_a_gradient(x):
    moe = make_moe()
    moe.router.requires_grad_(False)
    output = moe(x)
    loss = aux_loss(moe)
    assert loss > 0
    assert not loss.requires_grad
    (output.sum() + loss).backward()
    assert moe.router.gate.weight.grad is None
    assert moe.experts.weight_in.grad.any()


def test_a_model_without_a_layer_is_refused():
    with pytest.raises(ValueError, match="found no MoE layer in this model; pass the model that contains them"):
        aux_loss(nn.Linear(2, 2))


class FirstExpert(Router):
    def forward(self, features, scope):
        logits = features.new_zeros(len(features), self.num_experts)
        index = torch.zeros(len(features), 1, dtype=torch.int64)
        return top_k_routing(index, torch.ones(len(features), 1), logits, logits.softmax(-1))


def test_a_layer_without_parameters(x):
    moe = MoE(FirstExpert(8, 2, 1), ModuleExperts(nn.Identity, 2), losses={"load_balance": 1.0})
    assert_close(moe(x), x)
    assert_close(aux_loss(moe), torch.tensor(1.0))
