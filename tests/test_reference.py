"""The reference against numbers worked out by hand."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import reference

LOGITS = torch.tensor([[1.0, 2.0, 4.0], [4.0, 1.0, 2.0]]).log()  # exp of them is the table itself
PHI_1 = 0.8413447  # Phi(1), from any table of the normal distribution


class Times(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


def test_mixture_adds_weighted_outputs():
    x = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    gates = torch.tensor([[0.5, 0.5], [0.0, 1.0]])
    assert_close(reference.mixture(x, gates, [Times(10), Times(100)]), torch.tensor([[55.0, 110.0], [300.0, 400.0]]))


def test_mixture_calls_an_expert_once_for_its_tokens_alone():
    seen = []
    expert = Times(2)
    expert.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
    idle = Times(3)
    idle.register_forward_pre_hook(lambda module, args: pytest.fail("an expert without tokens was called"))
    gates = torch.tensor([[1.0, 0.0], [0.0, 0.0], [1.0, 0.0]])
    output = reference.mixture(torch.tensor([[1.0], [2.0], [3.0]]), gates, [expert, idle])
    assert seen == [[[1.0], [3.0]]]
    assert_close(output, torch.tensor([[2.0], [0.0], [6.0]]))  # a token without an expert gets zero


def test_noisy_top_k_is_a_softmax_over_the_kept():
    none = torch.zeros_like(LOGITS)
    gates = reference.noisy_top_k(LOGITS, none, none, 2)
    assert_close(gates, torch.tensor([[0, 1 / 3, 2 / 3], [2 / 3, 0, 1 / 3]]))


def test_noisy_top_k_adds_scaled_noise():
    noise = torch.tensor([[1.0, 0.0, 0.0]])
    noise_std = torch.tensor([[math.log(8.0), 5.0, 5.0]])
    gates = reference.noisy_top_k(LOGITS[:1], noise_std, noise, 2)  # exp of the noisy logits: 8, 2, 4
    assert_close(gates, torch.tensor([[2 / 3, 0, 1 / 3]]))


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        ({}, [0, 2 / 7, 4 / 7]),
        ({"normalize": True}, [0, 1 / 3, 2 / 3]),
        ({"score_after_top_k": True}, [0, 1 / 3, 2 / 3]),
        ({"score": "sigmoid"}, [0, 2 / 3, 4 / 5]),
        ({"score": "sigmoid", "score_after_top_k": True}, [0, 2 / 3, 4 / 5]),
        ({"score": "sigmoid", "normalize": True}, [0, 10 / 22, 12 / 22]),
    ],
)
def test_top_k_variants(variant, expected):
    assert_close(reference.top_k(LOGITS, 2, **variant)[0], torch.tensor(expected))


def test_load_probability_of_one_in_two():
    """The other's noisy logit is the threshold, and the own noise counts only through its deviation."""
    logits, noise_std = torch.tensor([[0.0, 1.0]]), torch.tensor([[1.0, 2.0]])
    noise = torch.tensor([[1.0, 0.0]])  # noisy logits 1 and 1
    expected = [[1 - PHI_1, 0.5]]  # Phi((0 - 1) / 1), Phi((1 - 1) / 2)
    assert_close(reference.load_probability(logits, noise_std, noise, 1), torch.tensor(expected))


def test_load_probability_of_two_in_three():
    logits, noise_std = torch.tensor([[3.0, 1.0, 2.0]]), torch.ones(1, 3)
    expected = [[0.9772499, 1 - PHI_1, PHI_1]]  # thresholds: 2nd largest of (1, 2), (3, 2), (3, 1)
    assert_close(reference.load_probability(logits, noise_std, torch.zeros(1, 3), 2), torch.tensor(expected))


def test_load_probability_of_all_is_certain():
    assert_close(reference.load_probability(LOGITS, torch.ones(2, 3), torch.randn(2, 3), 3), torch.ones(2, 3))


FIRST_CHOICES_FIRST = [(token, choice) for choice in range(2) for token in range(3)]


@pytest.mark.parametrize(
    ("served", "kept"),
    [
        (FIRST_CHOICES_FIRST, {(0, 0), (1, 0), (0, 1), (1, 1)}),
        (FIRST_CHOICES_FIRST[::-1], {(2, 0), (1, 0), (2, 1), (1, 1)}),
        ([(1, 1), (2, 0), (0, 0), (0, 1), (1, 0), (2, 1)], {(1, 1), (2, 0), (0, 0), (0, 1)}),
    ],
)
def test_capacity_serves_in_the_order_given(served, kept):
    choices = [[0, 1], [0, 1], [0, 1]]
    assert reference.keep_within_capacity(choices, num_experts=2, capacity=2, served=served) == kept


def test_capacity_is_per_expert():
    choices = [[0], [0], [1], [2], [0]]
    kept = reference.keep_within_capacity(choices, 3, 1, [(token, 0) for token in range(5)])
    assert kept == {(0, 0), (2, 0), (3, 0)}


def test_cv_squared():
    assert_close(reference.cv_squared(torch.tensor([1.0, 2.0, 3.0])), torch.tensor(2 / 3 / 4))
    assert reference.cv_squared(torch.zeros(3)) == 0
    assert reference.cv_squared(torch.tensor([7.0])) == 0
