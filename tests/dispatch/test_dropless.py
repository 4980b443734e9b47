"""Dropless dispatch."""

import torch

from gatewright import Dropless
from tests.cases import random_routing


def test_nothing_is_dropped_however_uneven_the_load():
    routing = random_routing(50, num_experts=3, top_k=1)
    routing.expert_index.zero_()
    batch = Dropless().dispatch(torch.randn(50, 2), routing, training=True)
    assert batch.tokens_per_expert.tolist() == [50, 0, 0]
    assert batch.routing.sums.dropped == 0


def test_repr():
    assert repr(Dropless()) == "Dropless()"
