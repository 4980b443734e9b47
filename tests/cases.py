"""What differs between the registered classes: how to build one, and what is not so of every one.

The contract and parity suites run over these tables. A router of the usual signature needs nothing here but its
reference, which is in `tests/references.py`; a kind of experts needs a line in `EXPERT_CASES`.
"""

import warnings
from functools import partial

import torch
from torch import nn

from gatewright import (
    Biased,
    Capacity,
    ExpertChoice,
    ExpertDropout,
    GroupedFeedForward,
    GroupLimited,
    Hashed,
    Hierarchical,
    MergedMoE,
    ModuleExperts,
    MoE,
    NoisyTopK,
    Sinkhorn,
    Soft,
    SoftMoE,
    TopK,
)
from gatewright.dispatch import DISPATCHERS
from gatewright.routers import ROUTERS
from gatewright.routers.expert_bias import ExpertBias
from gatewright.routing import top_k_routing

NUM_EXPERTS = 9
"""Of most layers here: three groups of three, where a token takes two; neither 2 nor 4 processes come out even."""


def in_groups(dim, num_experts, top_k, **options):
    """A group-limited router, in groups of more than one expert where they can be of equal size."""
    return GroupLimited(dim, num_experts, top_k, **groups_of(num_experts, top_k), **options)


def in_two_levels(dim, num_experts, top_k):
    """A hierarchical router, in groups of more than one expert where they can be of equal size."""
    return Hierarchical(dim, num_experts, top_k, **groups_of(num_experts, top_k))


def groups_of(num_experts, top_k):
    """How many groups, and from how many of them a token takes equally many of its experts."""
    sizes = [size for size in range(2, num_experts) if num_experts % size == 0]
    num_groups = next((size for size in sizes if size * size >= num_experts), max(num_experts, 1))
    fits = (chosen for chosen in (2, 1, top_k) if 0 < chosen <= num_groups and top_k % chosen == 0)
    room = num_experts // num_groups
    return {"num_groups": num_groups, "top_k_groups": next((c for c in fits if top_k <= c * room), 1)}


ROUTER_CASES = {
    **ROUTERS,
    "biased-softmax": partial(Biased, score="softmax", normalize=False),
    "biased-unnormalized": partial(Biased, normalize=False),
    "group-limited-v2": partial(in_groups, score="softmax", group_score="max", normalize=False, bias_rate=0.0),
    "group-limited-v3": in_groups,
    "expert-choice-normalized": partial(ExpertChoice, normalize=True),
    "expert-dropout": lambda *sizes: ExpertDropout(NoisyTopK(*sizes), 0.4),
    "hierarchical-in-groups": in_two_levels,
    "sinkhorn-sigmoid": partial(Sinkhorn, score="sigmoid"),
    "top-k-gate-bias": partial(TopK, gate_bias=True),
    "top-k-jitter": partial(TopK, jitter=0.2),
    "top-k-after": partial(TopK, score_after_top_k=True),
    "top-k-normalized": partial(TopK, normalize=True),
    "top-k-sigmoid": partial(TopK, score="sigmoid"),
    "top-k-sigmoid-normalized": partial(TopK, score="sigmoid", normalize=True),
}
ROUTER_CLASSES = [*ROUTERS, "expert-dropout", "group-limited-v3", "hierarchical-in-groups"]
"""Cases for what does not depend on how a class makes its scores: one of each, and those whose groups hold several."""
DISPATCHER_CASES = {
    **DISPATCHERS,
    "capacity-tight": partial(Capacity, 0.6, 1),
    "capacity-tight-by-weight": partial(Capacity, 0.6, 1, "largest-weight"),
}
SOFT_CASES = {
    "soft": Soft,
    "soft-groups": partial(Soft, slots_per_expert=2, group_size=3),
    "soft-per-token": partial(Soft, group_size=1),
}
EXPERT_CASES = {
    "grouped-feed-forward": lambda num_experts, dim: GroupedFeedForward(num_experts, dim, 2 * dim),
    "grouped-relu-bias": lambda num_experts, dim: GroupedFeedForward(
        num_experts, dim, dim + 4, activation="relu", bias=True
    ),
    "grouped-swiglu-bias": lambda num_experts, dim: GroupedFeedForward(
        num_experts, dim, dim, activation="swiglu", bias=True
    ),
    "modules": lambda num_experts, dim: ModuleExperts(partial(two_layers, dim, 3), num_experts),
    "modules-different": lambda num_experts, dim: ModuleExperts([two_layers(dim, 3 + i) for i in range(num_experts)]),
}


def two_layers(dim, ffn):
    """An expert whose output is not 0 for an input of 0."""
    return nn.Sequential(nn.Linear(dim, ffn), nn.Tanh(), nn.Linear(ffn, dim))


def make_router(case, dim, num_experts, top_k):
    """A router with random parameters: some start at zero, where every expert ties. `Soft` takes no top_k."""
    if case in SOFT_CASES:
        router = SOFT_CASES[case](dim, num_experts)
        nn.init.constant_(router.scale, 3.0)  # Weights are then far from even.
        return router
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of top-1 weights that are always 1.
        router = ROUTER_CASES[case](dim, num_experts, top_k)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=dim**-0.5)
    for module in router.modules():
        if isinstance(module, ExpertBias):
            nn.init.normal_(module.bias, std=0.1)
    return router


def make_moe(
    router="top-k", experts="grouped-feed-forward", dispatcher="dropless", *, dim=8, num_experts=NUM_EXPERTS, top_k=2
):
    if experts == "merged":
        return make_merged(router, dim, num_experts, top_k)
    return MoE(
        make_router(router, dim, num_experts, top_k),
        EXPERT_CASES[experts](num_experts, dim),
        dispatcher=DISPATCHER_CASES[dispatcher](),
    )


def make_soft_moe(router="soft", experts="grouped-feed-forward", *, dim=8, num_experts=5):
    """A layer that mixes tokens into slots."""
    return SoftMoE(make_router(router, dim, num_experts, None), EXPERT_CASES[experts](num_experts, dim))


def mixture_of(router, experts, dim=8):
    if router in SOFT_CASES:
        return SoftMoE(SOFT_CASES[router](dim, experts.num_experts), experts)
    return MoE(make_router(router, dim, experts.num_experts, 2), experts)


def make_merged(router="top-k", dim=8, num_experts=NUM_EXPERTS, top_k=2):
    return MergedMoE(make_router(router, dim, num_experts, top_k), partial(two_layers, dim, 3), num_experts)


def random_routing(num_tokens, num_experts=4, top_k=2, dtype=torch.float32):
    """A routing as a router makes it, whose weights take a gradient."""
    logits = torch.randn(num_tokens, num_experts, dtype=dtype, requires_grad=True)
    top = logits.topk(top_k)
    return top_k_routing(top.indices, top.values.sigmoid(), logits, logits.softmax(-1))


def features_for(router, num_tokens):
    """What a router routes by: numbers, or the integers that a hash takes."""
    if type(router) in KEYED:
        return torch.randint(10_000, (num_tokens, router.dim))
    return torch.randn(num_tokens, router.dim)


def run(moe, x, mask=None):
    """Call a layer on vectors; a router by keys gets keys that are a function of each vector."""
    return moe(x, keys_of(x) if type(moe.router) in KEYED else None, mask)


def padded(x):
    """The vectors with NaN behind the first three and behind the last, and the mask that is True where they are not."""
    first = min(3, len(x))
    mask = torch.tensor([True] * first + [False] * 3 + [True] * (len(x) - first) + [False] * 3)
    return x.new_full((len(mask), *x.shape[1:]), torch.nan).index_put((mask,), x), mask


def run_beside(moe, x, images):
    """Call a layer inside a network; keys are a function of what the network was given, which is exact everywhere."""
    if type(getattr(moe, "router", None)) in KEYED:
        return moe(x, keys_of(images.flatten(1)[:, : x.shape[1]]))
    return moe(x)


def keys_of(x):
    """Integers that are a function of each vector."""
    return x.detach().double().mul(1000).long()


def dense_weights(routing):
    """The record as a matrix of weights, (tokens, experts)."""
    num_tokens = int(routing.sums.num_tokens)
    weights = routing.weight.new_zeros(num_tokens, routing.num_experts + 1)
    return weights.index_put((routing.token_index, routing.expert_index), routing.weight, accumulate=True)[:, :-1]


# What is not so of every router.
KEYED = {Hashed}  # routed by integer keys, handed to the layer as features
BATCHWISE = {ExpertChoice, Sinkhorn}  # in training a token's route depends on the rest of its batch
DROPS = {ExpertDropout}  # in training discards assignments at random, and scales up the rest
EXPERTS_CHOOSE = {ExpertChoice}  # a token may get any number of experts
BIASED = {Biased, GroupLimited, Sinkhorn}  # chosen by another score than the one that weighs
UNTAUGHT = {ExpertChoice: {"threshold"}}  # parameters by name that the task does not teach, of each class that has some
