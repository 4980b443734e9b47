"""The record between the four nouns."""

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from gatewright import Routing, RoutingSums
from gatewright.routing import top_k_routing

# Two tokens, three experts, two choices each; exp of the logits is [[1, 2, 4], [4, 1, 2]].
LOGITS = torch.tensor([[1.0, 2.0, 4.0], [4.0, 1.0, 2.0]]).log()
EXPERT_INDEX = torch.tensor([[2, 1], [0, 2]])
WEIGHT = torch.tensor([[0.75, 0.25], [0.5, 0.5]])


def routing(**load):
    return top_k_routing(EXPERT_INDEX, WEIGHT, LOGITS, LOGITS.softmax(-1), **load)


def test_first_choices_come_before_second_choices():
    record = routing()
    assert record.token_index.tolist() == [0, 1, 0, 1]
    assert record.expert_index.tolist() == [2, 0, 1, 2]
    assert record.weight.tolist() == [0.75, 0.5, 0.25, 0.5]
    assert record.num_experts == 3


def test_sums_by_hand():
    sums = routing().sums
    entropy = -sum(p * torch.tensor(p).log() for p in (1 / 7, 2 / 7, 4 / 7))
    assert_close(sums.num_tokens, torch.tensor(2))
    assert_close(sums.tokens_per_expert, torch.tensor([1, 1, 2]))
    assert_close(sums.importance, torch.tensor([0.5, 0.25, 1.25]))
    assert_close(sums.load, sums.tokens_per_expert.float())
    assert_close(sums.probs, torch.tensor([5 / 7, 3 / 7, 6 / 7]))
    assert_close(sums.router_z, 2 * torch.tensor(7.0).log() ** 2)
    assert_close(sums.entropy, 2 * entropy)
    assert_close(sums.dropped, torch.tensor(0))


def test_a_smooth_load_replaces_the_count():
    assert_close(routing(load=torch.full((2, 3), 0.5)).sums.load, torch.ones(3))


def test_sums_add_up_field_by_field():
    records = routing(), routing(load=torch.rand(2, 3))
    one, other = (record.with_sums(extra={"own": torch.rand(2)}).sums for record in records)
    total = one + other
    assert isinstance(total, RoutingSums)
    assert "own" in total.extra
    for name, value in total.by_name().items():
        assert_close(value, one.by_name()[name] + other.by_name()[name])


def test_drop_keeps_the_length_and_counts_what_it_drops():
    record = routing()
    kept = record.drop(torch.tensor([True, False, False, True])).drop(torch.tensor([False, False, True, False]))
    assert kept.expert_index.tolist() == [3, 0, 3, 3]
    assert kept.weight.tolist() == [0, 0.5, 0, 0]
    assert kept.token_index.tolist() == [0, 1, 0, 1]
    assert kept.sums.dropped == 3
    assert_close(kept.sums.tokens_per_expert, record.sums.tokens_per_expert)  # as the router chose
    assert record.expert_index.tolist() == [2, 0, 1, 2]  # the record given is as it was


def test_a_dropped_assignment_gets_no_gradient():
    weight = WEIGHT.clone().requires_grad_()
    record = top_k_routing(EXPERT_INDEX, weight, LOGITS, LOGITS.softmax(-1))
    record.drop(torch.tensor([True, False, False, False])).weight.sum().backward()
    assert weight.grad.tolist() == [[0, 1], [1, 1]]


def test_shapes_are_checked_while_tests_run():
    """Guards tests/conftest.py: without its import hook no annotation of the package would be looked at."""
    record = routing()
    with pytest.raises(jaxtyping.TypeCheckError):
        Routing(record.token_index, record.expert_index, record.weight[:-1], record.sums)
    with pytest.raises(jaxtyping.TypeCheckError):
        top_k_routing(EXPERT_INDEX, WEIGHT, LOGITS[:1], LOGITS.softmax(-1))
