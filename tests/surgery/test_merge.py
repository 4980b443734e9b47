import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import GroupedFeedForward, ModuleExperts, MoE, ResidualMixture, TopK
from gatewright.surgery import FeedForward, densify, grow, merge, upcycle
from gatewright.surgery.merge import hidden_units
from tests.cases import make_router
from tests.references import one_by_one
from tests.surgery.test_experts import step, trained
from tests.surgery.test_split import Gated, plain

X = torch.randn(30, 16, generator=torch.Generator().manual_seed(3))
KINDS = {
    "grouped": lambda: GroupedFeedForward(5, 16, 24),
    "swiglu": lambda: GroupedFeedForward(5, 16, 24, activation="swiglu", bias=True),
    "modules": lambda: ModuleExperts(plain, 5),
    "gated": lambda: ModuleExperts(Gated, 5),
}
EVERY_KIND = pytest.mark.parametrize("kind", KINDS)


def mixture(kind, router="top-k-after", **options):
    return MoE(make_router(router, 16, 5, 2), KINDS[kind](), **options)


def shuffle(experts, expert):
    """Bring the hidden units of an expert into another order."""
    views = hidden_units(experts, expert)
    order = torch.randperm(len(views[0]))
    for view in views:
        view.copy_(view[order])


@EVERY_KIND
def test_copies_in_another_order_of_their_hidden_units_are_found_and_merged_without_a_change(kind):
    model = nn.Sequential(mixture(kind, "biased")).eval()
    expected = model(X)
    grow(model, 7)
    copied = [one_by_one(model[0].experts)[expert](X) for expert in (5, 6)]
    shuffle(model[0].experts, 5)
    shuffle(model[0].experts, 6)
    for expert, before in zip((5, 6), copied, strict=True):
        assert_close(one_by_one(model[0].experts)[expert](X), before)
    assert merge(model, 5) == {"0": [[0, 5], [1, 6], [2], [3], [4]]}
    assert_close(model(X), expected)


def test_a_merged_expert_is_the_mean_of_all_that_it_is_made_of_and_trains_on():
    model = nn.Sequential(nn.Linear(8, 16), mixture("grouped"))
    model, optimizer = trained(model)
    experts, gate = model[1].experts, model[1].router.gate
    with torch.no_grad():  # three alike, of which the first two are nearest
        for other, scale in ((2, 1.001), (3, 1.01)):
            experts.weight_in[other], experts.weight_out[other] = experts.weight_in[0] * scale, experts.weight_out[0]
        shuffle(experts, 3)
    before, rows = experts.weight_in[0].detach().clone(), gate.weight.detach().clone()
    assert merge(model, 3, optimizer=optimizer) == {"1": [[0, 2, 3], [1], [4]]}
    assert_close(model[1].experts.weight_in[0].detach(), before * (1 + 1.001 + 1.01) / 3)
    assert_close(model[1].router.gate.weight.detach(), torch.stack([rows[[0, 2, 3]].mean(0), rows[1], rows[4]]))
    step(model, optimizer)


@EVERY_KIND
def test_equal_experts_become_one_dense_module_that_computes_the_same(kind):
    layer = mixture(kind, "top-k-normalized")
    expert = one_by_one(layer.experts)[1]
    expected = expert(X)
    with torch.no_grad():
        for other in (0, 2, 3, 4):
            for mine, its in zip(parts(layer, other), parts(layer, 1), strict=True):
                mine.copy_(its)
            shuffle(layer.experts, other)
    model = nn.Sequential(layer).eval()
    assert_close(model(X), expected)
    assert densify(model) is model
    assert not isinstance(model[0], MoE)
    assert_close(model(X.view(5, 6, 16)), expected.view(5, 6, 16))


def parts(layer, expert):
    if isinstance(layer.experts, ModuleExperts):
        return [*layer.experts.experts[expert].parameters()]
    return [parameter.detach()[expert] for parameter in layer.experts.parameters()]


def test_a_dense_network_comes_back_from_upcycling_and_weights_choose():
    block = plain()
    model = nn.Sequential(block, nn.Linear(16, 16), plain()).eval()
    expected = model(X)
    upcycle(model, FeedForward, 3)
    densify(model, {"0": [1.0, 2.0, 0.0]})
    assert isinstance(model[2], MoE)
    assert_close(model(X), expected)
    other = copy.deepcopy(model[2].experts.experts[1])
    nn.init.normal_(other.linear1.weight)
    model[2].experts.experts[1] = other
    densify(model, {"2": torch.tensor([0, 3, 0])})
    assert_close(model[2](X), other(X))


@pytest.mark.parametrize(
    ("act", "layer", "error"),
    [
        (lambda model: merge(model, 6), mixture("grouped"), "got num_experts=6 for 5 experts of 0"),
        (lambda model: merge(model, 1), mixture("grouped"), "got top_k=2 and 1 experts"),
        (lambda model: merge(model, 2), MoE(TopK(16, 2, 1), ModuleExperts([plain(), Gated()])), "of 0 differ"),
        (lambda model: merge(model, 1), MoE(TopK(4, 2, 1), ModuleExperts(lambda: nn.Linear(4, 5), 2)), "are 4 -> 5"),
        (lambda model: densify(model, {"0": [1, 0]}), mixture("grouped"), r"got \[1.0, 0.0\] for 5 experts"),
        (lambda model: densify(model, {"0": [0] * 5}), mixture("grouped"), "one of them is above 0"),
        (densify, mixture("grouped", shared=nn.Identity()), "no shared expert"),
        (densify, ResidualMixture(mixture("grouped")), "0.moe does not do"),
    ],
)
def test_what_cannot_be_merged_is_refused_and_left_as_it_was(act, layer, error):
    model = nn.Sequential(layer)
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=error):
        act(model)
    assert_close(model.state_dict(), before.state_dict())
    assert repr(model) == repr(before)
