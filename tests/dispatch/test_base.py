"""Grouping rows by expert, by hand."""

import torch
from torch.testing import assert_close

from gatewright.dispatch.base import count, group_by_expert
from gatewright.routing import top_k_routing


def routing_of(choices, num_experts, weight=None):
    """Tokens that chose these experts, best first."""
    index = torch.tensor(choices)
    logits = torch.zeros(len(choices), num_experts)
    weight = torch.ones(index.shape) if weight is None else torch.tensor(weight)
    return top_k_routing(index, weight, logits, logits.softmax(-1))


def test_group_by_expert_by_hand():
    x = torch.tensor([[10.0], [20.0], [30.0]])
    routing = routing_of([[2, 0], [0, 2], [2, 0]], 3, [[0.6, 0.4], [0.7, 0.3], [0.8, 0.2]])
    batch = group_by_expert(x, routing.drop(torch.tensor([True, False, False, False, False, False])))
    assert batch.rows.flatten().tolist() == [20, 10, 30, 30, 20, 10]  # first choices first, the dropped one last
    assert batch.tokens_per_expert.tolist() == [3, 0, 2]
    assert batch.routing.expert_index.tolist() == [0, 0, 0, 2, 2, 3]
    assert_close(batch.routing.weight, torch.tensor([0.7, 0.4, 0.2, 0.8, 0.3, 0.0]))


def test_count_leaves_out_the_dropped():
    routing = routing_of([[2, 0], [0, 2], [2, 0]], 4).drop(torch.tensor([True, False, True, False, False, False]))
    assert count(routing).tolist() == [3, 0, 1, 0]
    assert count(routing).dtype == torch.int64
