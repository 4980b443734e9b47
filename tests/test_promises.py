"""What each combination of router, experts and dispatcher keeps to, and that `docs/promises.md` says just that."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from gatewright import Capacity, GroupedFeedForward, ModuleExperts, MoE, SoftMoE, TopK, moe_layers
from tests.cases import BATCHWISE, ROUTER_CLASSES, SOFT_CASES, make_moe
from tests.promises.measure import (
    TOLERANCE,
    Row,
    alone_in_evaluation,
    alone_in_training,
    bfloat16,
    in_one_graph,
    measure,
    parity,
    same_when_checkpointed,
    same_when_padded,
    worst,
)
from tests.promises.page import PAGE, parse, render
from tests.promises.places import PLACES, TABLES, make


@pytest.fixture(scope="module")
def page():
    return PAGE.read_text(encoding="utf-8")


def promised(layer):
    moe = next(moe for _, moe in moe_layers(layer))
    mixes_all = isinstance(moe, SoftMoE) and moe.router.group_size is None
    drops = isinstance(getattr(moe, "dispatcher", None), Capacity)
    return {
        "alone_in_evaluation": not mixes_all,
        "alone_in_training": not (mixes_all or drops or type(moe.router) in BATCHWISE),
        "one_graph": not isinstance(moe.experts, ModuleExperts),
        "checkpointing": True,
        "padding": True,
    }


QUICK = {
    next(iter(TABLES)): ROUTER_CLASSES,
    "`SoftMoE` of `GroupedFeedForward`": [*SOFT_CASES],
    "Beside dispatch": [row for row in TABLES["Beside dispatch"] if row != "`ResidualMixture` of `MergedMoE`"],
}


def rows():
    """Every row; those marked slow combine what others have: one table has every class of router, each has one row."""
    for table, row in PLACES:
        quick = row in QUICK.get(table, ("noisy-top-k", "soft"))
        yield pytest.param(table, row, marks=[] if quick else [pytest.mark.slow])


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize(("table", "row"), [*rows()])
def test_every_combination(unhooked, page, table, row):
    measured = measure(table, row, unhooked(in_one_graph, table, row).result)
    assert measured.answers() == promised(make(table, row)[0])
    assert not measured.too_large()
    written = parse(page)[0][table, row]
    assert written.answers() == measured.answers()
    assert not written.too_large()


def test_the_page_is_what_its_rows_make_it(page):
    """Every combination, no other, and each sentence as it is generated: if not, run `make promises`."""
    rows, versions = parse(page)
    assert list(rows) == PLACES
    assert page == render(rows, versions)


def test_a_figure_beyond_its_tolerance_or_undefined_is_too_large():
    row = Row(1e-5, 1e-5, 1e-12, 1e-12, True, True, True, True, True, 5e-2)
    assert not row.too_large()
    assert set(replace(row, output_float32=1.1e-5, gradient_float64=math.nan).too_large()) == {
        "output_float32",
        "gradient_float64",
    }
    assert math.isnan(worst([1.0, math.nan, 2.0]))


class Wrong(nn.Module):
    def __init__(self, fault):
        super().__init__()
        self.linear, self.fault, self.calls = nn.Linear(8, 8), fault, 0

    def forward(self, x):
        self.calls += 1
        return self.fault(self.linear(x), self.calls)


def faulty(fault):
    return MoE(TopK(8, 1), ModuleExperts(lambda: Wrong(fault), 1), losses={})


def test_an_expert_that_looks_at_its_other_rows_is_found():
    layer, x = faulty(lambda y, _: y - y.mean(0)), torch.randn(12, 8)
    assert not alone_in_evaluation(layer, x)
    assert not alone_in_training(layer, x)
    assert same_when_checkpointed(layer, x)


def test_an_expert_that_computes_something_else_the_second_time_is_found():
    layer, x = faulty(lambda y, calls: y * calls), torch.randn(12, 8)
    assert not same_when_checkpointed(layer, x)
    assert alone_in_evaluation(faulty(lambda y, calls: y), x)


def test_a_weight_that_the_reference_does_not_know_is_found():
    layer, x = make_moe("top-k-sigmoid"), torch.randn(12, 8)
    layer.register_forward_hook(lambda module, inputs, output: output * (1 + 1e-4))
    output, gradient = parity(layer, x, torch.float32)
    assert min(output, gradient) > TOLERANCE["float32"]


def test_a_router_that_counts_masked_items_is_found():
    class Unmasked(TopK):
        def forward(self, features, scope, mask=None):
            return super().forward(features, scope)

    assert not same_when_padded(MoE(Unmasked(8, 4, 2), GroupedFeedForward(4, 8, 16)), torch.randn(12, 8))


def test_a_route_that_autocast_changes_is_found():
    class Coarse(TopK):
        def forward(self, features, scope):
            return super().forward(nn.functional.linear(features, torch.eye(8)), scope)

    layer, x = MoE(Coarse(8, 4, 2), GroupedFeedForward(4, 8, 16)), torch.randn(12, 8)
    assert bfloat16(layer, x) == math.inf
