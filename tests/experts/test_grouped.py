"""Stacked feed-forward experts."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from gatewright import GroupedFeedForward, MoE, TopK


def test_an_expert_is_two_linear_layers():
    for (activation, function), bias in product([("gelu", nn.GELU()), ("relu", nn.ReLU())], [False, True]):
        experts = GroupedFeedForward(2, 3, 5, activation=activation, bias=bias)
        plain = nn.Sequential(nn.Linear(3, 5, bias), function, nn.Linear(5, 3, bias))
        with torch.no_grad():
            for layer, weight, offset in (
                (plain[0], experts.weight_in, experts.bias_in),
                (plain[2], experts.weight_out, experts.bias_out),
            ):
                layer.weight.copy_(weight[1].t())
                if bias:
                    layer.bias.copy_(offset[1])
        rows = torch.randn(4, 3)
        assert_close(experts(rows, torch.tensor([0, 4])), plain(rows))


def test_swiglu_by_hand():
    """silu(gate) * up, the gate being the first half of what comes in: silu(2) * 3 = 2 / (1 + exp(-2)) * 3."""
    experts = GroupedFeedForward(1, 1, 1, activation="swiglu")
    with torch.no_grad():
        experts.weight_in.copy_(torch.tensor([[[2.0, 3.0]]]))
        experts.weight_out.fill_(10.0)
    output = experts(torch.ones(1, 1), torch.tensor([1]))
    assert_close(output, 60 / (1 + torch.tensor([[-2.0]]).exp()))


def test_first_weights_are_those_of_a_linear_layer():
    for activation in ["gelu", "relu", "swiglu"]:
        experts = GroupedFeedForward(4, 64, 256, activation=activation, bias=True)
        for parameter, inputs in (
            (experts.weight_in, 64),
            (experts.bias_in, 64),
            (experts.weight_out, 256),
            (experts.bias_out, 256),
        ):
            bound = inputs**-0.5
            assert 0.97 * bound < parameter.abs().max() <= bound
            assert_close(parameter.std().item(), bound / 3**0.5, rtol=0.1, atol=0)


def test_autocast_leaves_float64_alone():
    experts = GroupedFeedForward(2, 3, 5, bias=True).double()
    rows, counts = torch.randn(4, 3, dtype=torch.float64), torch.tensor([1, 3])
    with torch.autocast("cpu", torch.bfloat16):
        output = experts(rows, counts)
    assert torch.equal(output, experts(rows, counts))


def ones_through(dropout, num_rows, size=50):
    """Experts that return their hidden activations, which are all 1 before dropout, and their rows."""
    experts = GroupedFeedForward(2, size, size, activation="relu", dropout=dropout)
    with torch.no_grad():
        for weight in (experts.weight_in, experts.weight_out):
            weight.copy_(torch.eye(size).expand_as(weight))
    return experts, torch.ones(num_rows, size, requires_grad=True)


def test_dropout_zeroes_hidden_activations_and_scales_the_rest_in_training_alone():
    """At its rate, within 5 standard errors; gradients go where activations stayed; rows past the last group give 0."""
    rate = 0.25
    experts, rows = ones_through(rate, 400)
    output = experts(rows, torch.tensor([150, 200]))
    assert not output[350:].any()
    kept = output[:350] > 0
    assert_close(output[:350], kept / (1 - rate))
    assert (kept.float().mean() - (1 - rate)).abs() < 5 * (rate * (1 - rate) / kept.numel()) ** 0.5
    (gradient,) = torch.autograd.grad(output.sum(), rows)
    assert_close(gradient, output)
    assert_close(experts.eval()(rows, torch.tensor([150, 200]))[:350], torch.ones(350, 50))


def test_parametrized_weights_are_computed_with_and_never_written_to_in_vain():
    """The fused way reads them like any others."""
    moe, x = MoE(TopK(3, 4, 2), GroupedFeedForward(4, 3, 5), losses={}), torch.randn(7, 3)
    expected = copy.deepcopy(moe)
    with torch.no_grad():
        expected.experts.weight_in.mul_(2)
    parametrize.register_parametrization(moe.experts, "weight_in", Doubled())
    assert_close(moe(x), expected(x))
    for change in (moe.experts.reset_parameters, lambda: moe.experts.keep(0, 2), moe.reset_parameters):
        with pytest.raises(ValueError, match=r"of these experts weight_in is computed by torch.nn.utils.parametrize"):
            change()


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_refused():
    for setting, message in [
        ({"num_experts": 0}, "num_experts, dim and ffn are at least 1; got 0, 3 and 5"),
        ({"dim": 0}, "got 2, 0 and 5"),
        ({"ffn": -1}, "got 2, 3 and -1"),
        ({"dropout": -0.1}, "dropout is at least 0 and below 1; got -0.1"),
        ({"dropout": 1.0}, "got 1.0"),
        ({"activation": "tanh"}, "activation is 'gelu', 'relu' or 'swiglu'; got 'tanh'"),
    ]:
        with pytest.raises(ValueError, match=message):
            GroupedFeedForward(**{"num_experts": 2, "dim": 3, "ffn": 5, **setting})
