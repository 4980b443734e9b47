"""Every combination that the page has a row for."""

from functools import partial

import torch
from torch import nn

from gatewright import MoE, ResidualMixture
from tests.cases import (
    DISPATCHER_CASES,
    EXPERT_CASES,
    NUM_EXPERTS,
    ROUTER_CASES,
    SOFT_CASES,
    make_merged,
    make_moe,
    make_router,
    make_soft_moe,
    two_layers,
)
from tests.compare import SEED

TOKENS = 12  # four groups of three
KINDS = {"GroupedFeedForward": "grouped", "ModuleExperts": "modules"}


def tables():
    """By table and row, functions that make layers for a given ``dim``.

    A row has the parity of all its layers, the worst of each figure; all else is of the first.
    """
    made = {}
    for kind, prefix in KINDS.items():
        cases = [experts for experts in EXPERT_CASES if experts.startswith(prefix)]
        for name, dispatcher in DISPATCHER_CASES.items():
            if name == "capacity":  # the tight ones do the same and drop more
                continue
            made[f"`{kind}`, `{dispatcher()!r}`"] = {
                router: [partial(make_moe, router, experts, name) for experts in cases] for router in ROUTER_CASES
            }
        made[f"`SoftMoE` of `{kind}`"] = {
            router: [partial(make_soft_moe, router, experts) for experts in cases] for router in SOFT_CASES
        }
    return made | {"Beside dispatch": {name: [make] for name, make in beside().items()}}


def beside():
    """Layers that are more, or less, than a router, experts and a dispatcher."""
    return {
        "`MergedMoE`, all experts": partial(make_merged, "top-k-sigmoid", top_k=NUM_EXPERTS),
        "`MergedMoE`, two of nine": partial(make_merged, "noisy-top-k"),
        "`ResidualMixture` of `GroupedFeedForward`": partial(residual_of, partial(make_moe, "noisy-top-k")),
        "`ResidualMixture` of `ModuleExperts`": partial(residual_of, partial(make_moe, "noisy-top-k", "modules")),
        "`ResidualMixture` of `MergedMoE`": partial(residual_of, partial(make_merged, "noisy-top-k")),
        "`GroupedFeedForward`, `shared=`": with_shared,
    }


def residual_of(make_mixture, dim):
    """A mixture beside a dense branch, with coefficients that differ from item to item."""
    layer = ResidualMixture(make_mixture(dim=dim), two_layers(dim, 5))
    nn.init.normal_(layer.coefficient.weight)
    return layer


def with_shared(dim):
    """A mixture with an expert for all."""
    experts = EXPERT_CASES["grouped-feed-forward"](NUM_EXPERTS, dim)
    return MoE(make_router("noisy-top-k", dim, NUM_EXPERTS, 2), experts, shared=two_layers(dim, 5))


TABLES = tables()
PLACES = [(table, row) for table, rows in TABLES.items() for row in rows]


def make(table, row, dim=8, case=0):
    """A layer of a row, and items for it."""
    torch.manual_seed(SEED)
    return TABLES[table][row][case](dim=dim), torch.randn(TOKENS, dim)
