"""What every dispatcher keeps to. A new one in `DISPATCHERS` is run through all of it."""

import copy
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright.dispatch import DISPATCHERS
from tests.cases import DISPATCHER_CASES, random_routing

pytestmark = [
    pytest.mark.parametrize("case", DISPATCHER_CASES),
    pytest.mark.filterwarnings("ignore:A capacity of 1 row"),
]
SHAPES = [(0, 2, (3,)), (1, 1, (3,)), (17, 2, (3,)), (9, 4, (2, 3, 3))]  # num_tokens, top_k, item
MODES = (True, False)  # training, evaluation


def pairs(routing):
    """Assignments as (token, expert)."""
    return list(zip(routing.token_index.tolist(), routing.expert_index.tolist(), strict=True))


def test_rows_are_grouped_by_expert_in_order_of_arrival_and_come_back(case):
    """Through experts that change nothing, with weights of 1, a token comes back as often as it was kept."""
    for training, (num_tokens, top_k, item) in product(MODES, SHAPES):
        dispatcher, x, routing = (
            DISPATCHER_CASES[case](),
            torch.randn(num_tokens, *item),
            random_routing(num_tokens, 4, top_k),
        )
        routing = replace(routing, weight=torch.ones_like(routing.weight))
        batch = dispatcher.dispatch(x, routing, training=training)
        token_index, expert_index = batch.routing.token_index, batch.routing.expert_index
        assert batch.rows.shape == (num_tokens * top_k, *item)  # whatever was dropped
        assert torch.equal(batch.rows, x[token_index])
        counts = batch.tokens_per_expert.tolist()
        dropped = num_tokens * top_k - sum(counts)
        assert expert_index.tolist() == [e for e, n in enumerate([*counts, dropped]) for _ in range(n)]
        assert batch.routing.sums.dropped == dropped
        assert dropped == 0 or training
        kept, arrival = pairs(batch.routing)[: sum(counts)], pairs(routing)
        assert kept == sorted(kept, key=lambda pair: (pair[1], arrival.index(pair)))
        times = torch.zeros(num_tokens).index_add(0, token_index[: sum(counts)], torch.ones(sum(counts)))
        output = dispatcher.combine(batch.rows, batch, num_tokens)
        assert_close(output, x * times.reshape(-1, *[1] * len(item)))


@pytest.mark.parametrize("training", MODES)
def test_gradients_reach_what_was_kept_and_nothing_else(case, training):
    """Of ``sum_i w_i x_i``: d/dx is the sum of the kept weights, d/dw is x where kept, and 0 where dropped."""
    x, routing = torch.randn(17, 3, requires_grad=True), random_routing(17)
    routing.weight.retain_grad()
    dispatcher = DISPATCHER_CASES[case]()
    batch = dispatcher.dispatch(x, routing, training=training)
    dispatcher.combine(batch.rows, batch, 17).sum().backward()
    kept = pairs(batch.routing)
    is_kept = torch.tensor([float(pair in kept) for pair in pairs(routing)])
    assert_close(routing.weight.grad, is_kept * x.detach().sum(-1).repeat(2))
    per_token = (is_kept * routing.weight.detach()).view(2, 17).sum(0)
    assert_close(x.grad, per_token[:, None].expand(17, 3))


@pytest.mark.parametrize("training", MODES)
def test_a_dispatcher_keeps_no_state_and_can_be_used_again_in_between(case, training):
    shared, x = DISPATCHER_CASES[case](), torch.randn(17, 3)
    routings = [random_routing(17), random_routing(17)]
    batches = [shared.dispatch(x, routing, training=training) for routing in routings]
    for routing, batch in zip(routings, batches, strict=True):
        alone = DISPATCHER_CASES[case]()
        expected = alone.combine(alone.dispatch(x, routing, training=training).rows, batch, 17)
        assert torch.equal(shared.combine(batch.rows, batch, 17), expected)


def test_an_assignment_dropped_before_dispatch_stays_dropped(case):
    """A router may drop for reasons of its own: those rows come last, count for nobody and return zero."""
    routing = random_routing(9).drop(torch.arange(18) % 9 == 4)
    dispatcher, x = DISPATCHER_CASES[case](), torch.randn(9, 3)
    for training in (True, False):
        batch = dispatcher.dispatch(x, routing, training=training)
        assert 4 not in batch.routing.token_index[: int(batch.tokens_per_expert.sum())]
        assert not dispatcher.combine(batch.rows, batch, 9)[4].any()


def test_rows_are_weighted_and_added_in_at_least_float32(case):
    """Sixty times 1 / 64 and a bit that a weight of the rows' type would lose, and that shows in the sum."""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        weight = torch.full((60,), (1 + 0.45 * torch.finfo(dtype).eps) / 64)
        routing, dispatcher = replace(random_routing(1, 60, 60), weight=weight), DISPATCHER_CASES[case]()
        batch = dispatcher.dispatch(torch.ones(1, 3, dtype=dtype), routing, training=False)
        output = dispatcher.combine(batch.rows, batch, 1)
        assert output.dtype == dtype
        assert_close(output, weight.double().sum().to(dtype).expand(1, 3), rtol=0, atol=1e-12)


def test_copies_behave_alike_and_it_is_known_by_its_names(case):
    dispatcher = DISPATCHER_CASES[case]()
    other = copy.deepcopy(dispatcher)
    x, routing = torch.randn(17, 3), random_routing(17)
    rows = [d.dispatch(x, routing, training=True).rows for d in (dispatcher, other)]
    assert torch.equal(*rows)
    assert repr(other) == repr(dispatcher)
    assert repr(dispatcher).startswith(f"{type(dispatcher).__name__}(")
    if case in DISPATCHERS:
        assert DISPATCHERS[case].__name__.lower() == case
