"""Discarded assignments: how many, which, what the rest weigh, and what the wrapped router keeps for itself."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import (
    BatchScope,
    Biased,
    ExpertChoice,
    ExpertDropout,
    Hashed,
    ModuleExperts,
    MoE,
    Router,
    Soft,
    TopK,
    aux_loss,
    end_step,
)
from gatewright.losses import LOSSES
from gatewright.routers.expert_dropout import STREAM
from gatewright.routing import flat_routing
from gatewright.scope import ONE_PROCESS
from tests.cases import dense_weights, make_router
from tests.references import reference_gates

SEED, NUM_EXPERTS = 1, 5


class Listed(Router):
    """A router that lists given assignments in a given order, some of which were not made."""

    def __init__(self, token_index, expert_index):
        super().__init__(3, NUM_EXPERTS, 2)
        self.token_index, self.expert_index = torch.tensor(token_index), torch.tensor(expert_index)

    def forward(self, features, scope=ONE_PROCESS):
        logits, made = torch.zeros(len(features), NUM_EXPERTS), (self.expert_index < NUM_EXPERTS).float()
        return flat_routing(self.token_index, self.expert_index, 0.3 * made, logits, logits.softmax(-1))


def route(router, features):
    torch.manual_seed(SEED)
    return router(features)


def test_training_is_the_references_and_losses_see_what_was_chosen():
    for rate, inner in product([0.1, 0.5, 0.9], ["noisy-top-k", "top-k", "expert-choice", "hierarchical", "sinkhorn"]):
        router = ExpertDropout(make_router(inner, 6, NUM_EXPERTS, 2), rate).double()
        features = torch.randn(21, 6, dtype=torch.float64)
        routing, chosen = route(router, features), route(router.router, features)
        torch.manual_seed(SEED)
        gates = reference_gates(router, features)
        assert_close(dense_weights(routing), gates, rtol=0, atol=1e-12)
        assert routing.sums.dropped == (chosen.expert_index < NUM_EXPERTS).sum() - (gates > 0).sum()
        assert 0 < routing.sums.dropped < len(routing.weight)
        for loss in LOSSES.values():
            assert_close(loss(routing.sums), loss(chosen.sums))


def test_what_is_discarded_depends_on_token_and_expert_and_not_on_the_order_in_the_list():
    tokens, experts = [0, 1, 2, 0, 1, 2, 3, 3], [4, 0, 1, 2, 3, 0, 1, 2]
    order = [5, 2, 7, 0, 1, 4, 3, 6]
    scope = BatchScope(torch.tensor(11))
    listed = ExpertDropout(Listed(tokens, experts), 0.5)(torch.zeros(4, 3), scope)
    shuffled = ExpertDropout(Listed([tokens[i] for i in order], [experts[i] for i in order]), 0.5)
    other = shuffled(torch.zeros(4, 3), scope)
    assert torch.equal(other.expert_index, listed.expert_index[order])
    assert 0 < listed.sums.dropped < 8
    noise = scope.uniform(torch.empty(4, NUM_EXPERTS), STREAM)
    assert torch.equal(listed.expert_index == NUM_EXPERTS, noise[tokens, experts] < 0.5)


def test_an_assignment_that_was_not_made_is_not_discarded():
    router = ExpertDropout(Listed([0] * 4 + [1] * 4, [NUM_EXPERTS] * 8), 0.99)
    routing = route(router, torch.zeros(2, 3))
    assert routing.sums.dropped == 0
    assert not routing.weight.any()


class Seen(nn.Linear):
    """A linear layer that counts the rows it is given."""

    rows = 0

    def forward(self, x):
        self.rows += len(x)
        return super().forward(x)


def test_what_is_discarded_is_never_computed():
    experts = [Seen(6, 6) for _ in range(NUM_EXPERTS)]
    moe = MoE(ExpertDropout(make_router("top-k", 6, NUM_EXPERTS, 2), 0.5), ModuleExperts(experts))
    for expert in experts:
        expert.rows = 0
    moe(torch.randn(40, 6))
    aux_loss(moe)
    dropped = int(moe.routing.sums.dropped)
    assert 0 < dropped < 80
    assert sum(expert.rows for expert in experts) == 80 - dropped


def test_the_router_takes_note_and_adapts_as_if_it_were_alone():
    moe = MoE(ExpertDropout(Biased(6, NUM_EXPERTS, 2), 0.5), ModuleExperts(lambda: nn.Linear(6, 6), NUM_EXPERTS))
    moe(torch.randn(9, 6))
    aux_loss(moe)
    inner = moe.router.router
    assert_close(inner.expert_bias.load, moe.routing.sums.tokens_per_expert)
    assert inner.expert_bias.load.sum() == 18
    end_step(moe)
    assert inner.expert_bias.bias.any()


def test_sizes_and_losses_are_the_routers():
    inner = ExpertChoice(6, NUM_EXPERTS, 2)
    router = ExpertDropout(inner, 0.1)
    assert (router.dim, router.num_experts, router.top_k) == (6, NUM_EXPERTS, 2)
    assert router.default_losses == dict(inner.default_losses)
    assert "rate=0.1" in repr(router)


def test_a_router_by_keys_may_be_wrapped():
    routing = route(ExpertDropout(Hashed(1, NUM_EXPERTS, 2), 0.5), torch.arange(30)[:, None])
    assert 0 < routing.sums.dropped < 60
    assert set(routing.weight.tolist()) == {0.0, 1.0}


def test_impossible_rates_are_refused():
    for rate in [-0.1, 1.0, 1.5, float("nan")]:
        with pytest.raises(ValueError, match=f"rate is at least 0 and below 1; got {rate}"):
            ExpertDropout(TopK(6, NUM_EXPERTS), rate)


@pytest.mark.usefixtures("unchecked")
def test_it_is_wrapped_once_and_around_a_sparse_router():
    with pytest.raises(ValueError, match=r"ExpertDropout already\. Wrap it once"):
        ExpertDropout(ExpertDropout(TopK(6, NUM_EXPERTS), 0.1), 0.1)
    with pytest.raises(ValueError, match=r"discards the assignments of .*; got Soft"):
        ExpertDropout(Soft(6, NUM_EXPERTS), 0.1)
