"""What the load of the experts says."""

import math

import torch
from torch.testing import assert_close

from gatewright import RoutingSums, metrics


def sums(*tokens_per_expert, num_tokens=4, entropy=0.0, dropped=0):
    counts, zero = torch.tensor(tokens_per_expert), torch.zeros(len(tokens_per_expert))
    scalars = [torch.tensor(value) for value in (0.0, entropy, dropped)]
    return RoutingSums(torch.tensor(num_tokens), counts, zero, zero, zero, *scalars)


CASES = {
    "even": sums(2, 2, 2, 2),
    "one": sums(0, 3, 0, 0),
    "uneven": sums(3, 1, 0),
    "nothing": sums(0, 0, 0, num_tokens=0),
}


def test_by_hand():
    for case, metric, expected in [
        ("even", "load_share", [0.25] * 4),
        ("even", "load_cv", 0.0),
        ("even", "max_over_mean_load", 1.0),
        ("even", "max_violation", 0.0),
        ("even", "load_entropy", math.log(4)),
        ("even", "dead_experts", [False] * 4),
        ("one", "load_share", [0.0, 1.0, 0.0, 0.0]),
        ("one", "load_cv", math.sqrt(3)),
        ("one", "max_over_mean_load", 4.0),
        ("one", "max_violation", 3.0),
        ("one", "load_entropy", 0.0),
        ("one", "dead_experts", [True, False, True, True]),
        ("uneven", "load_share", [0.75, 0.25, 0.0]),
        ("uneven", "load_cv", math.sqrt((5**2 + 1**2 + 4**2) / 27) * 3 / 4),  # deviations 5/3, -1/3, -4/3 of 4/3
        ("uneven", "max_over_mean_load", 9 / 4),
        ("uneven", "max_violation", 5 / 4),
        ("uneven", "load_entropy", -0.75 * math.log(0.75) - 0.25 * math.log(0.25)),
        ("uneven", "dead_experts", [False, False, True]),
        ("nothing", "load_share", [0.0] * 3),
        ("nothing", "load_cv", 0.0),
        ("nothing", "max_over_mean_load", 0.0),
        ("nothing", "max_violation", 0.0),
        ("nothing", "load_entropy", 0.0),
        ("nothing", "router_entropy", 0.0),
        ("nothing", "drop_rate", 0.0),
        ("nothing", "dead_experts", [True] * 3),
    ]:
        assert_close(getattr(metrics, metric)(CASES[case]), torch.tensor(expected))


def test_router_entropy_is_a_mean_over_tokens():
    assert_close(metrics.router_entropy(sums(1, 1, num_tokens=8, entropy=2.0)), torch.tensor(0.25))


def test_drop_rate_is_a_share_of_assignments():
    assert_close(metrics.drop_rate(sums(3, 1, num_tokens=2, dropped=1)), torch.tensor(0.25))


def test_the_worst_max_over_mean_is_experts_over_top_k():
    """Two choices per token, always the same two of six."""
    assert_close(metrics.max_over_mean_load(sums(5, 5, 0, 0, 0, 0, num_tokens=5)), torch.tensor(3.0))
