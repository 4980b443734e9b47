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


def test_a_shared_expert_is_added_for_every_token():
    x, gates = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5], [0.0]])
    output = reference.mixture(x, gates, [Times(10)], shared=Times(100))
    assert_close(output, torch.tensor([[105.0, 210.0], [300.0, 400.0]]))


class Shift(nn.Module):
    """Not linear in its parameter: the square of the sum."""

    def __init__(self, shift):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x):
        return (x + self.shift) ** 2


def test_merged_mixes_parameters_before_the_expert_runs():
    x, gates = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[0.5, 0.25], [0.0, 1.0]])
    output = reference.merged(x, gates, [Shift(2.0), Shift(8.0)])  # shifts of 3 and 8
    assert_close(output, torch.tensor([[16.0, 25.0], [121.0, 144.0]]))


def test_residual_weighs_by_a_softmax_of_the_item():
    coefficient = nn.Linear(2, 2)
    with torch.no_grad():
        coefficient.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        coefficient.bias.copy_(torch.tensor([math.log(3.0), 0.0]))
    mixed, kept = torch.tensor([[8.0], [10.0]]), torch.tensor([[4.0], [0.0]])
    x = torch.tensor([[0.0, 0.0], [0.0, math.log(2.0)]])  # shares of 3 to 1 and 3 to 2
    assert_close(reference.residual(x, mixed, kept, coefficient), torch.tensor([[7.0], [6.0]]))


def test_noisy_top_k_is_a_softmax_over_the_kept():
    none = torch.zeros_like(LOGITS)
    gates = reference.noisy_top_k(LOGITS, none, none, 2)
    assert_close(gates, torch.tensor([[0, 1 / 3, 2 / 3], [2 / 3, 0, 1 / 3]]))


def test_noisy_top_k_adds_scaled_noise():
    noise = torch.tensor([[1.0, 0.0, 0.0]])
    noise_std = torch.tensor([[math.log(8.0), 5.0, 5.0]])
    gates = reference.noisy_top_k(LOGITS[:1], noise_std, noise, 2)  # exp of the noisy logits: 8, 2, 4
    assert_close(gates, torch.tensor([[2 / 3, 0, 1 / 3]]))


def test_top_k_variants():
    for variant, expected in [
        ({}, [0, 2 / 7, 4 / 7]),
        ({"normalize": True}, [0, 1 / 3, 2 / 3]),
        ({"score_after_top_k": True}, [0, 1 / 3, 2 / 3]),
        ({"score": "sigmoid"}, [0, 2 / 3, 4 / 5]),
        ({"score": "sqrt_softplus"}, [0, math.log(3) ** 0.5, math.log(5) ** 0.5]),
        ({"score": "sigmoid", "score_after_top_k": True}, [0, 2 / 3, 4 / 5]),
        ({"score": "sigmoid", "normalize": True}, [0, 10 / 22, 12 / 22]),
    ]:
        assert_close(reference.top_k(LOGITS, 2, **variant)[0], torch.tensor(expected))


def test_soft_mixture_mixes_tokens_into_slots_and_back():
    """Cosines of 0 and 1 make shares of 1 to 3; slots of 5 and 7 where both tokens are one group."""
    for group_size, expected in [(2, [[212.5], [537.5]]), (1, [[130.0], [620.0]])]:
        scale = torch.tensor(3.0).log()
        dispatch, combine = reference.soft(torch.tensor([[5.0, 0.0], [0.0, 2.0]]), torch.eye(2), scale, group_size)
        assert_close(combine, torch.tensor([[0.75, 0.25], [0.25, 0.75]]), rtol=1e-5, atol=1e-5)
        assert_close(dispatch, combine if group_size == 2 else torch.ones(2, 2), rtol=1e-5, atol=1e-5)
        output = reference.soft_mixture(
            torch.tensor([[4.0], [8.0]]), dispatch, combine, [Times(10), Times(100)], group_size
        )
        assert_close(output, torch.tensor(expected), rtol=1e-5, atol=1e-3)


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


def certain(*rows):
    """A level without noise, by the exponentials of its logits."""
    logits = torch.tensor(rows).log()
    return logits, torch.ones_like(logits), torch.zeros_like(logits)


def test_hierarchical_multiplies_a_groups_gate_with_its_experts():
    """Groups weigh 1 to 3; of three experts each, the best two 2 to 6 and 3 to 2."""
    gates = reference.hierarchical(certain([1.0, 3.0]), certain([1.0, 2.0, 6.0, 3.0, 2.0, 1.0]), 2, 4)
    assert_close(gates, torch.tensor([[0, 1 / 16, 3 / 16, 9 / 20, 6 / 20, 0]]))
    gates = reference.hierarchical(certain([1.0, 3.0]), certain([1.0, 2.0, 6.0, 3.0, 2.0, 1.0]), 1, 1)
    assert_close(gates, torch.tensor([[0, 0, 0, 1.0, 0, 0]]))


def test_hierarchical_load_is_the_groups_times_the_mean_of_its_tokens():
    """Both tokens choose the first group, by a logit of 1: its load is twice Phi(1), the other's experts have none."""
    e = math.e
    primary, secondary = certain([e, 1.0], [e, 1.0]), certain([e, 1.0, 1.0, 1.0], [1.0, e, 1.0, 1.0])
    load = reference.hierarchical_load(primary, secondary, 1, 1)  # Phi(1) and Phi(-1) in turn, of mean 1 / 2
    assert_close(load, torch.tensor([PHI_1, PHI_1, 0, 0]))


def test_hashed_gives_k_experts_equal_weights_and_the_same_key_the_same():
    gates = reference.hashed(torch.tensor([[3, 4], [4, 3], [3, 4]]), 60, 2, seed=1)
    assert_close(gates.sum(1), torch.ones(3))
    assert sorted(set(gates.flatten().tolist())) == [0, 0.5]
    assert torch.equal(gates[0], gates[2])
    assert not torch.equal(gates[0], gates[1])


def test_expert_dropout_scales_what_stays():
    gates, noise = torch.tensor([[0.5, 0.5], [0.0, 0.8]]), torch.tensor([[0.1, 0.9], [0.9, 0.2]])
    assert_close(reference.expert_dropout(gates, noise, 0.2), torch.tensor([[0.0, 0.625], [0.0, 1.0]]))


FIRST_CHOICES_FIRST = [(token, choice) for choice in range(2) for token in range(3)]


def test_capacity_serves_in_the_order_given():
    for served, kept in [
        (FIRST_CHOICES_FIRST, {(0, 0), (1, 0), (0, 1), (1, 1)}),
        (FIRST_CHOICES_FIRST[::-1], {(2, 0), (1, 0), (2, 1), (1, 1)}),
        ([(1, 1), (2, 0), (0, 0), (0, 1), (1, 0), (2, 1)], {(1, 1), (2, 0), (0, 0), (0, 1)}),
    ]:
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


def test_group_limited_variants():
    """Sigmoids 1/2, 2/3, 4/5, 1/2, the third 0.2 less for selection; groups of two. The last of equals is left out."""
    for variant, expected in [
        ({"top_k": 2}, [1 / 2 / (7 / 6), 2 / 3 / (7 / 6), 0, 0]),
        ({"top_k": 1, "normalize": False, "scale": 3.0}, [0, 2.0, 0, 0]),
        ({"top_k": 1, "group_score": "max", "normalize": False}, [0, 2 / 3, 0, 0]),
        ({"top_k": 2, "group_score": "max", "score": "softmax", "normalize": False}, [0, 0, 4 / 8, 1 / 8]),
        ({"top_k": 3, "top_k_groups": 2, "normalize": False}, [1 / 2, 2 / 3, 4 / 5, 0]),
        ({"top_k": 1, "num_groups": 1, "normalize": False}, [0, 2 / 3, 0, 0]),
    ]:
        logits = torch.tensor([[1.0, 2.0, 4.0, 1.0]]).log()
        settings = {"num_groups": 2, "top_k_groups": 1, **variant}
        gates = reference.group_limited(logits, torch.tensor([0.0, 0.0, -0.2, 0.0]), **settings)
        assert_close(gates, torch.tensor([expected]))


def test_a_bias_moves_towards_the_mean_load():
    bias, load = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 2.0, 5.0, 1.0])
    assert_close(reference.moved_bias(bias, load, 0.5), torch.tensor([1.5, 2.0, 2.5, 4.5]))
    assert_close(reference.moved_bias(bias, torch.zeros(4), 0.5), bias)


SCORES = torch.tensor([[0.5, 0.5], [0.75, 0.25], [0.25, 0.75], [0.6, 0.4]])


def test_experts_choose_their_best_tokens():
    mask = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    assert_close(reference.batchwise_mask(SCORES, 1), mask)
    assert_close(reference.batchwise_mask(torch.zeros(3, 2), 1), torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
    mask[1, 1] = 1
    mask[3, 0] = 0
    assert_close(reference.expert_choice(SCORES, mask), SCORES * mask)
    normalized = [[0.0, 1.0], [0.75, 0.25], [0.0, 1.0], [0.0, 0.0]]
    assert_close(reference.expert_choice(SCORES, mask, normalize=True), torch.tensor(normalized))


def test_the_threshold_loss_is_by_how_much_a_score_is_on_the_wrong_side():
    """The second expert misses the first token by 0.1; the first one passes it, 0.02 too much."""
    assert_close(reference.threshold_loss(SCORES, torch.tensor([0.55, 0.6]), 1), torch.tensor(0.1))
    assert_close(reference.threshold_loss(SCORES, torch.tensor([0.48, 0.6]), 1), torch.tensor(0.12))


def test_sinkhorns_plan_keeps_the_cross_ratio():
    """exp(logits) is ((1, 1), (1, 4)); an even plan is ((a, 1 - a), (1 - a, a)) with a^2 / (1 - a)^2 = 4."""
    plan = reference.sinkhorn(torch.tensor([[1.0, 1.0], [1.0, 4.0]]).log(), 1e-7, 1000)
    assert_close(plan, torch.tensor([[2 / 3, 1 / 3], [1 / 3, 2 / 3]]))
