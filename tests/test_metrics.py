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
    cv = math.sqrt((5**2 + 1**2 + 4**2) / 27) * 3 / 4  # deviations 5/3, -1/3, -4/3 of 4/3
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    names = ("load_share", "load_cv", "max_over_mean_load", "max_violation", "load_entropy", "dead_experts")
    for case, values in {
        "even": ([0.25] * 4, 0.0, 1.0, 0.0, math.log(4), [False] * 4),
        "one": ([0.0, 1.0, 0.0, 0.0], math.sqrt(3), 4.0, 3.0, 0.0, [True, False, True, True]),
        "uneven": ([0.75, 0.25, 0.0], cv, 9 / 4, 5 / 4, entropy, [False, False, True]),
        "nothing": ([0.0] * 3, 0.0, 0.0, 0.0, 0.0, [True] * 3),
    }.items():
        for name, expected in zip(names, values, strict=True):
            assert_close(getattr(metrics, name)(CASES[case]), torch.tensor(expected))
    for name in ("router_entropy", "drop_rate"):
        assert getattr(metrics, name)(CASES["nothing"]) == 0


def test_router_entropy_is_a_mean_over_tokens():
    assert_close(metrics.router_entropy(sums(1, 1, num_tokens=8, entropy=2.0)), torch.tensor(0.25))


def test_drop_rate_is_a_share_of_assignments():
    assert_close(metrics.drop_rate(sums(3, 1, num_tokens=2, dropped=1)), torch.tensor(0.25))


def test_the_worst_max_over_mean_is_experts_over_top_k():
    """Two choices per token, always the same two of six."""
    assert_close(metrics.max_over_mean_load(sums(5, 5, 0, 0, 0, 0, num_tokens=5)), torch.tensor(3.0))
