"""Dispatch with a capacity: how much room, who gets it, and the warning where there is next to none."""

import math
import re
import warnings
from fractions import Fraction
from itertools import product

import pytest
import torch

from gatewright import Capacity, reference
from tests.cases import dense_weights, random_routing
from tests.dispatch.test_base import routing_of

BY_TOKEN = ("arrival", "total-weight")  # the same where weights of a token add up to 1


def test_capacity_by_hand():
    for factor, min_capacity, assignments, experts, rows in [
        (1.0, 1, 100, 10, 10),
        (1.0, 1, 101, 10, 11),
        (1.25, 4, 64, 8, 10),
        (1.25, 4, 16, 8, 4),  # the minimum
        (0.5, 1, 100, 10, 5),
        (2, 1, 3, 40, 1),
        (1.05, 1, 20, 3, 7),  # a little more in floating point
        (1.25, 4, 0, 8, 4),
    ]:
        assert Capacity(factor, min_capacity).capacity(assignments, experts) == rows


def test_capacity_is_the_formula_in_exact_arithmetic():
    for factor in ["1.0", "1.05", "1.1", "1.25", "1.5", "2.0"]:
        dispatcher = Capacity(float(factor), 1)
        for experts in range(1, 41):
            for assignments in range(1, 400, 3):
                exact = math.ceil(Fraction(factor) * assignments / experts)
                assert dispatcher.capacity(assignments, experts) == exact


@pytest.mark.parametrize("priority", ["arrival", "largest-weight", "total-weight"])
def test_it_keeps_exactly_what_the_reference_keeps(priority):
    for (num_tokens, num_experts, top_k), factor in product(
        [(63, 5, 2), (40, 3, 3), (17, 8, 1), (1, 4, 4)], [0.4, 0.8, 1.0]
    ):
        routing, dispatcher = random_routing(num_tokens, num_experts, top_k), Capacity(factor, 2, priority)
        batch = dispatcher.dispatch(torch.randn(num_tokens, 2), routing, training=True)
        choices = routing.expert_index.view(top_k, num_tokens).t().tolist()
        served = [(token, choice) for choice in range(top_k) for token in range(num_tokens)]
        served = reference.prioritised(served, dense_weights(routing), priority)
        capacity = max(2, math.ceil(factor * num_tokens * top_k / num_experts))
        kept = reference.keep_within_capacity(choices, num_experts, capacity, served)
        total = int(batch.tokens_per_expert.sum())
        pairs = zip(
            batch.routing.token_index[:total].tolist(), batch.routing.expert_index[:total].tolist(), strict=True
        )
        assert {(token, choices[token].index(expert)) for token, expert in pairs} == kept
        assert batch.routing.sums.dropped == num_tokens * top_k - len(kept)
        assert batch.tokens_per_expert.max() <= capacity


def test_weight_serves_the_largest_first_and_ties_in_order_of_arrival():
    routing = routing_of([[0], [0], [0], [0]], 2, [[0.2], [0.9], [0.5], [0.5]])
    batch = Capacity(1.0, 2, "total-weight").dispatch(torch.arange(4.0)[:, None], routing, training=True)
    assert batch.rows.flatten().tolist()[:2] == [1, 2]


def test_sums_of_normalised_weights_tie_though_they_differ_by_rounding():
    weight = torch.randn(400, 3).softmax(-1)
    assert weight.sum(1).unique().numel() > 1
    routing = routing_of(torch.rand(400, 8).topk(3).indices.tolist(), 8, weight.tolist())
    kept = [Capacity(0.5, 1, priority).dispatch(torch.randn(400, 2), routing, training=True) for priority in BY_TOKEN]
    arrival, total = ((b.routing.token_index[b.routing.weight > 0], b.routing.expert_index) for b in kept)
    assert torch.equal(arrival[0], total[0])
    assert torch.equal(arrival[1], total[1])


def test_rows_dropped_by_the_router_take_no_room_and_are_counted_once():
    routing = routing_of([[0], [0], [0], [0], [1], [0]], 2).drop(torch.tensor([True, True, True, False, False, False]))
    batch = Capacity(0.6, 2).dispatch(torch.arange(6.0)[:, None], routing, training=True)
    assert batch.rows.flatten().tolist() == [3, 5, 4, 0, 1, 2]
    assert batch.tokens_per_expert.tolist() == [2, 1]
    assert batch.routing.sums.dropped == 3


def test_one_expert_too_is_warned_of_where_it_takes_one_row_of_many():
    with pytest.warns(UserWarning, match="capacity_factor=0.4 for 2 rows"):
        Capacity(0.2, 1).dispatch(torch.randn(5, 2), random_routing(5, 1, 1), training=True)


def test_a_capacity_of_one_row_warns_once_and_names_the_factor_that_mends_it():
    """The origin of this project ran 40 experts on batches of 4: one row per expert, and the rest were dropped."""
    for priority, (num_tokens, num_experts, top_k) in product(
        ["arrival", "largest-weight", "total-weight"], [(4, 40, 1), (16, 40, 2), (7, 7, 1), (3, 5, 1), (2, 3, 1)]
    ):
        x, routing = torch.randn(num_tokens, 2), random_routing(num_tokens, num_experts, top_k)
        dispatcher = Capacity(1.0, 1, priority)
        with pytest.warns(UserWarning, match="capacity of 1 row per expert") as caught:
            dispatcher.dispatch(x, routing, training=True)
        dispatcher.dispatch(x, routing, training=True)
        assert len(caught) == 1
        factor = float(re.search(r"capacity_factor=([\d.]+)", str(caught[0].message))[1])
        mended = Capacity(factor, 1, priority)
        assert mended.capacity(num_tokens * top_k, num_experts) >= 2
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            mended.dispatch(x, routing, training=True)


def test_it_does_not_warn_where_one_row_is_enough(recwarn):
    """In evaluation, for one token or none, for one expert that takes all, and for more rows than experts."""
    for num_tokens, num_experts, training in [
        (4, 40, False),
        (1, 40, True),
        (0, 40, True),
        (5, 1, True),
        (41, 40, True),
    ]:
        Capacity(1.0, 1).dispatch(
            torch.randn(num_tokens, 2), random_routing(num_tokens, num_experts, 1), training=training
        )
        assert not recwarn


@pytest.mark.usefixtures("unchecked")
def test_wrong_settings_are_refused():
    for setting, message in [
        (
            {"capacity_factor": 0.0},
            "capacity_factor is finite and above 0 .* got 0.0 and 4. For no limit at all use Dropless",
        ),
        ({"capacity_factor": -1.0}, "capacity_factor is finite and above 0"),
        ({"capacity_factor": math.inf}, "got inf and 4"),
        ({"capacity_factor": float("nan")}, "got nan"),
        ({"min_capacity": 0}, "min_capacity at least 1; got 1.25 and 0"),
        ({"priority": "luck"}, "priority is 'arrival', 'largest-weight' or 'total-weight'; got 'luck'"),
    ]:
        with pytest.raises(ValueError, match=message):
            Capacity(**setting)
