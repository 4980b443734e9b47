"""Soft dispatch, worked out by hand and at the limits of types and sizes."""

from itertools import product

import torch
from torch.testing import assert_close

from gatewright import Soft, SoftDispatch
from gatewright.routing import soft_routing


def routing_of(dispatch, combine):
    """A record of these weights, (groups, group_tokens, experts, slots), whatever they add up to."""
    dispatch, combine = torch.as_tensor(dispatch), torch.as_tensor(combine)
    return soft_routing(torch.zeros(dispatch[..., 0, 0].numel(), dispatch[0, 0].numel()), dispatch, combine)


def test_rows_and_outputs_by_hand():
    """Two groups of two tokens, two experts of one slot: the rows of the first expert come first."""
    dispatch = torch.tensor([[[0.5, 1.0], [0.5, 0.0]], [[0.25, 0.0], [0.75, 1.0]]])[..., None]
    combine = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.25, 0.75]]])[..., None]
    batch = SoftDispatch().dispatch(
        torch.tensor([[10.0], [20.0], [40.0], [80.0]]), routing_of(dispatch, combine), training=True
    )
    assert batch.rows.flatten().tolist() == [15, 70, 10, 80]
    assert batch.tokens_per_expert.tolist() == [2, 2]
    output = SoftDispatch().combine(torch.tensor([[1.0], [2.0], [3.0], [4.0]]), batch, 4)
    assert output.flatten().tolist() == [1, 2, 4, 3.5]


def test_slots_of_an_expert_and_group_stand_together():
    routing = Soft(4, 3, slots_per_expert=2, group_size=5)(torch.randn(10, 4))
    x = torch.randn(10, 4)
    batch = SoftDispatch().dispatch(x, routing, training=False)
    assert batch.tokens_per_expert.tolist() == [4, 4, 4]
    for expert in range(3):
        for group in range(2):
            for slot in range(2):
                expected = routing.dispatch[group, :, expert, slot] @ x[5 * group : 5 * group + 5]
                assert_close(batch.rows[4 * expert + 2 * group + slot], expected)


def test_items_and_outputs_have_any_shape():
    for group_size, num_tokens, (item, out) in product(
        [None, 1, 3], [0, 6], [((3,), (3,)), ((2, 4, 4), (7,)), ((), (2, 2))]
    ):
        routing, dispatcher = Soft(4, 3, group_size=group_size)(torch.randn(num_tokens, 4)), SoftDispatch()
        batch = dispatcher.dispatch(torch.randn(num_tokens, *item), routing, training=True)
        groups = 1 if group_size is None else num_tokens // group_size
        assert batch.rows.shape == (3 * groups, *item)
        assert batch.tokens_per_expert.tolist() == [groups] * 3
        assert dispatcher.combine(torch.randn(3 * groups, *out), batch, num_tokens).shape == (num_tokens, *out)


def test_rows_are_weighted_and_added_in_at_least_float32():
    """Sixty times 1 / 64 and a bit that a weight of the rows' type would lose, and that shows in the sum."""
    for autocast, dtype in product([False, True], [torch.bfloat16, torch.float16, torch.float64]):
        share = (1 + 0.45 * torch.finfo(dtype).eps) / 64
        weight = torch.full((1, 60, 1, 1), share)
        expected = (weight.double().sum()).to(dtype)
        gather, spread = routing_of(weight, weight), routing_of(*[weight.view(1, 1, 60, 1)] * 2)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            rows = SoftDispatch().dispatch(torch.ones(60, 3, dtype=dtype), gather, training=True).rows
            batch = SoftDispatch().dispatch(torch.ones(1, 3, dtype=dtype), spread, training=True)
            output = SoftDispatch().combine(torch.ones(60, 3, dtype=dtype), batch, 1)
        for found in (rows, output):
            assert found.dtype == dtype
            assert_close(found, expected.expand(1, 3), rtol=0, atol=1e-12)


def test_one_dispatcher_serves_several_batches_in_between():
    shared, x = SoftDispatch(), torch.randn(6, 4)
    routings = [Soft(4, 3)(x), Soft(4, 5, group_size=2)(x)]
    batches = [shared.dispatch(x, routing, training=True) for routing in routings]
    for routing, batch in zip(routings, batches, strict=True):
        assert batch.routing is routing
        mixed = torch.einsum("gtes,gues->gtu", routing.combine, routing.dispatch)
        expected = mixed @ x.view(len(mixed), -1, 4)
        assert_close(shared.combine(batch.rows, batch, 6), expected.flatten(0, 1))


def test_it_prints_its_name():
    assert repr(SoftDispatch()) == "SoftDispatch()"
