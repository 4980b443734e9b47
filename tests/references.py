"""How the reference says the same as each registered class: gates, what a capacity keeps, experts one by one."""

import torch
from torch import nn

from gatewright import (
    BatchScope,
    Biased,
    Capacity,
    ExpertChoice,
    ExpertDropout,
    GroupLimited,
    Hashed,
    Hierarchical,
    ModuleExperts,
    NoisyTopK,
    ProductKey,
    Sinkhorn,
    TopK,
    reference,
)
from gatewright.routers.expert_dropout import STREAM


def reference_gates(router, features):
    """The reference's (tokens, experts) weights; noise is drawn from torch's generator as the router draws it."""
    return REFERENCE_GATES[type(router)](router, features)


def logits_of(gate, features):
    logits = features @ gate.weight.t()
    return logits if gate.bias is None else logits + gate.bias


def _noisy_top_k_gates(router, features):
    logits, noise_std = logits_of(router.gate, features), nn.functional.softplus(features @ router.noise.weight.t())
    noise = BatchScope().normal(logits) if router.training else torch.zeros_like(logits)
    return reference.noisy_top_k(logits, noise_std, noise, router.top_k)


def _top_k_gates(router, features):
    if router.training and router.jitter:
        features = features * (1 + router.jitter * (2 * BatchScope().uniform(features) - 1))
    variant = {"score": router.score, "score_after_top_k": router.score_after_top_k, "normalize": router.normalize}
    return reference.top_k(logits_of(router.gate, features), router.top_k, **variant)


def _product_key_gates(router, features):
    """Those of top-k with the logits of all pairs."""
    columns, rows = logits_of(router.gate, features).split([router.num_columns, router.num_rows * router.has_rows], 1)
    logits = (
        torch.stack([row[:, None] + columns for row in rows.unbind(1)], 1).flatten(1) if router.has_rows else columns
    )
    return reference.top_k(logits, router.top_k, score_after_top_k=router.score_after_top_k)


def _biased_gates(router, features):
    logits, bias = logits_of(router.gate, features), router.expert_bias.bias
    settings = {"score": router.score, "normalize": router.normalize, "scale": router.scale}
    return reference.group_limited(logits, bias, router.top_k, **settings)


def _group_limited_gates(router, features):
    names = ("num_groups", "top_k_groups", "score", "group_score", "normalize", "scale")
    settings = {name: getattr(router, name) for name in names}
    return reference.group_limited(logits_of(router.gate, features), router.expert_bias.bias, router.top_k, **settings)


def _expert_choice_gates(router, features):
    scores = reference.top_k(logits_of(router.gate, features), router.num_experts)
    if router.training:
        mask = reference.batchwise_mask(scores, router.top_k)
    else:
        mask = (scores > router.threshold).to(scores.dtype)
    return reference.expert_choice(scores, mask, normalize=router.normalize)


def _sinkhorn_gates(router, features):
    logits = logits_of(router.gate, features)
    plan = reference.sinkhorn(logits, router.tolerance, router.max_iterations).log() if router.training else logits
    scores = reference.top_k(logits, router.num_experts, score=router.score)
    return scores * (reference.top_k(plan, router.top_k) > 0)  # of the k largest entries in each row


def levels(router, features):
    """Both levels of a `Hierarchical` as the reference takes them; noise is drawn as the router draws it."""
    drawn = []
    for stream, level in ((1, router.primary), (0, router.secondary)):
        if level.gate is None:
            drawn.append((features.new_zeros(len(features), level.num_gates),) * 3)
            continue
        logits, noise_std = logits_of(level.gate, features), nn.functional.softplus(features @ level.noise.weight.t())
        noise = BatchScope().normal(logits, stream) if router.training else torch.zeros_like(logits)
        drawn.append((logits, noise_std, noise))
    return drawn


def _hierarchical_gates(router, features):
    return reference.hierarchical(*levels(router, features), router.top_k_groups, router.top_k)


def _hashed_gates(router, features):
    keys, seen = features[:, : router.dim - router.gate_dim].long(), features[:, router.dim - router.gate_dim :]
    gates = reference.hashed(keys, router.num_experts, router.top_k, router.seed)
    if router.gate is None:
        return gates
    all_scores = reference.top_k(seen @ router.gate.weight.t(), router.num_experts, score=router.score)
    return reference.gated(gates, all_scores)


def _expert_dropout_gates(router, features):
    gates = reference_gates(router.router, features)
    return (
        reference.expert_dropout(gates, BatchScope().uniform(gates, STREAM), router.rate) if router.training else gates
    )


REFERENCE_GATES = {
    Biased: _biased_gates,
    ExpertChoice: _expert_choice_gates,
    ExpertDropout: _expert_dropout_gates,
    GroupLimited: _group_limited_gates,
    Hashed: _hashed_gates,
    Hierarchical: _hierarchical_gates,
    NoisyTopK: _noisy_top_k_gates,
    ProductKey: _product_key_gates,
    Sinkhorn: _sinkhorn_gates,
    TopK: _top_k_gates,
}


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
        choices[token].append(expert)  # a second choice stays one where the first was discarded
    served = reference.prioritised(served, gates, dispatcher.priority)
    capacity = int(dispatcher.capacity(routing.sums.tokens_per_expert.sum(), num_experts))
    kept = torch.zeros_like(gates)
    for token, choice in reference.keep_within_capacity(choices, num_experts, capacity, served):
        kept[token, choices[token][choice]] = 1
    return gates * kept


def reference_soft(moe, x, features):
    router = moe.router
    group_size = router.group_size or len(x)
    weights = reference.soft(features, router.gate.weight.t(), router.scale[0], group_size)
    return reference.soft_mixture(x, *weights, one_by_one(moe.experts), group_size)


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
