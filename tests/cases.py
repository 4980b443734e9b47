"""What differs between the registered classes: how to build one, and how the reference says the same.

The contract and parity suites run over these tables. A router of the usual signature needs nothing here but its
reference; a kind of experts needs a line in `EXPERT_CASES`.
"""

import warnings
from functools import partial

import torch
from torch import nn

from gatewright import BatchScope, Capacity, GroupedFeedForward, ModuleExperts, MoE, NoisyTopK, TopK, reference
from gatewright.dispatch import DISPATCHERS
from gatewright.routers import ROUTERS
from gatewright.routing import top_k_routing

ROUTER_CASES = {
    **ROUTERS,
    "top-k-after": partial(TopK, score_after_top_k=True),
    "top-k-normalized": partial(TopK, normalize=True),
    "top-k-sigmoid": partial(TopK, score="sigmoid"),
    "top-k-sigmoid-normalized": partial(TopK, score="sigmoid", normalize=True),
}
DISPATCHER_CASES = {
    **DISPATCHERS,
    "capacity-tight": partial(Capacity, 0.6, 1),
    "capacity-tight-by-weight": partial(Capacity, 0.6, 1, "largest-weight"),
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
    """A router with random parameters: some start at zero, where every expert ties."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Of top-1 weights that are always 1.
        router = ROUTER_CASES[case](dim, num_experts, top_k)
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=dim**-0.5)
    return router


def make_moe(router="top-k", experts="grouped-feed-forward", dispatcher="dropless", *, dim=8, num_experts=5, top_k=2):
    return MoE(
        make_router(router, dim, num_experts, top_k),
        EXPERT_CASES[experts](num_experts, dim),
        dispatcher=DISPATCHER_CASES[dispatcher](),
    )


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


def run(moe, x):
    """Call a layer on vectors; a router by keys gets keys that are a function of each vector."""
    if type(moe.router) in KEYED:
        return moe(x, x.detach().double().mul(1000).long()[:, : moe.router.dim])
    return moe(x)


def dense_weights(routing):
    """The record as a matrix of weights, (tokens, experts)."""
    num_tokens = int(routing.sums.num_tokens)
    weights = routing.weight.new_zeros(num_tokens, routing.num_experts + 1)
    return weights.index_put((routing.token_index, routing.expert_index), routing.weight, accumulate=True)[:, :-1]


def reference_gates(router, features):
    """The reference's (tokens, experts) weights; noise is drawn from torch's generator as the router draws it."""
    return REFERENCE_GATES[type(router)](router, features)


def _noisy_top_k_gates(router, features):
    logits, noise_std = features @ router.gate.weight.t(), nn.functional.softplus(features @ router.noise.weight.t())
    noise = BatchScope().normal(logits) if router.training else torch.zeros_like(logits)
    return reference.noisy_top_k(logits, noise_std, noise, router.top_k)


def _top_k_gates(router, features):
    variant = {"score": router.score, "score_after_top_k": router.score_after_top_k, "normalize": router.normalize}
    return reference.top_k(features @ router.gate.weight.t(), router.top_k, **variant)


REFERENCE_GATES = {NoisyTopK: _noisy_top_k_gates, TopK: _top_k_gates}

# What is not so of every router.
KEYED = set()  # routed by integer keys, handed to the layer as features
BATCHWISE = set()  # in training a token's route depends on the rest of its batch
EXPERTS_CHOOSE = set()  # a token may get any number of experts
BIASED = set()  # chosen by another score than the one that weighs
UNTAUGHT = {}  # parameters by name that the task does not teach, of each class that has some


def reference_kept(gates, routing, dispatcher, training):
    """The reference's (tokens, experts) weights of the assignments that the dispatcher's capacity lets through."""
    if not isinstance(dispatcher, Capacity) or not training:
        return gates
    num_tokens, num_experts = gates.shape
    choices = [[] for _ in range(num_tokens)]
    served = []
    for token, expert in zip(routing.token_index.tolist(), routing.expert_index.tolist(), strict=True):
        if expert < num_experts:
            served.append((token, len(choices[token])))
            choices[token].append(expert)
    served = reference.prioritised(served, gates, dispatcher.priority)
    capacity = dispatcher.capacity(len(routing.weight), num_experts)
    kept = torch.zeros_like(gates)
    for token, choice in reference.keep_within_capacity(choices, num_experts, capacity, served):
        kept[token, choices[token][choice]] = 1
    return gates * kept


def one_by_one(experts):
    """The experts as one module each, sharing their parameters."""
    if isinstance(experts, ModuleExperts):
        return list(experts.experts)
    return [OneOfGrouped(experts, index) for index in range(experts.num_experts)]


class OneOfGrouped(nn.Module):
    """One expert of a `GroupedFeedForward`, in plain matrix products."""

    def __init__(self, grouped, index):
        super().__init__()
        self.grouped, self.index = [grouped], index

    def forward(self, x):
        (grouped,), index = self.grouped, self.index
        hidden = x @ grouped.weight_in[index]
        if grouped.bias_in is not None:
            hidden = hidden + grouped.bias_in[index]
        if grouped.activation == "swiglu":
            hidden = nn.functional.silu(hidden[:, : grouped.ffn]) * hidden[:, grouped.ffn :]
        else:
            hidden = getattr(nn.functional, grouped.activation)(hidden)
        output = hidden @ grouped.weight_out[index]
        return output if grouped.bias_out is None else output + grouped.bias_out[index]
