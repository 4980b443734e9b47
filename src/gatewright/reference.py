"""The specification: a mixture of experts in plain loops. Read this first.

Nothing here is fast and nothing is shared with the rest of the package; every router, dispatcher and kind of experts is
tested against it, outputs and gradients.
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


def mixture(
    x: Float[Tensor, "tokens *item"], gates: Float[Tensor, "tokens experts"], experts: Sequence[nn.Module]
) -> Float[Tensor, "tokens *out"]:
    """``y = sum_i G(x)_i E_i(x)``, calling an expert for the tokens whose gate is not 0.

    https://arxiv.org/abs/1701.06538 eq. 1. An expert sees its tokens as one batch, because BatchNorm makes that matter.
    A token without an expert gets zero.
    """
    outputs = [x.new_zeros(())] * len(x)
    for index, expert in enumerate(experts):
        tokens = [token for token in range(len(x)) if gates[token, index] != 0]
        if tokens:
            for token, row in zip(tokens, expert(x[tokens]), strict=True):
                outputs[token] = outputs[token] + gates[token, index] * row
    return torch.stack(torch.broadcast_tensors(*outputs))


def noisy_top_k(
    logits: Float[Tensor, "tokens experts"],
    noise_std: Float[Tensor, "tokens experts"],
    noise: Float[Tensor, "tokens experts"],
    top_k: int,
) -> Float[Tensor, "tokens experts"]:
    """``softmax(keep_top_k(logits + noise * noise_std))``: https://arxiv.org/abs/1701.06538 eqs. 3 to 5."""
    gates = []
    for row in logits + noise * noise_std:
        kept = sorted(range(len(row)), key=lambda i: -row[i].item())[:top_k]
        total = sum(row[i].exp() for i in kept)
        gates.append(torch.stack([row[i].exp() / total if i in kept else row[i] * 0 for i in range(len(row))]))
    return torch.stack(gates)


def load_probability(
    logits: Float[Tensor, "tokens experts"],
    noise_std: Float[Tensor, "tokens experts"],
    noise: Float[Tensor, "tokens experts"],
    top_k: int,
) -> Float[Tensor, "tokens experts"]:
    """``Phi((logit_i - kth_excluding(H, k, i)) / std_i)``: https://arxiv.org/abs/1701.06538 eqs. 8 and 9."""
    if top_k == logits.shape[1]:
        return torch.ones_like(logits)
    rows = []
    for clean, std, noisy in zip(logits, noise_std, logits + noise * noise_std, strict=True):
        row = []
        for i in range(len(clean)):
            others = sorted((noisy[j] for j in range(len(noisy)) if j != i), key=lambda value: -value.item())
            row.append(0.5 * (1 + torch.erf((clean[i] - others[top_k - 1]) / (std[i] * math.sqrt(2)))))
        rows.append(torch.stack(row))
    return torch.stack(rows)


def top_k(
    logits: Float[Tensor, "tokens experts"],
    top_k: int,
    *,
    score: str = "softmax",
    score_after_top_k: bool = False,
    normalize: bool = False,
) -> Float[Tensor, "tokens experts"]:
    """Scores of the k largest logits, 0 elsewhere: https://arxiv.org/abs/2101.03961 eqs. 1 and 2, and its variants."""
    gates = []
    for row in logits:
        kept = sorted(range(len(row)), key=lambda i: -row[i].item())[:top_k]
        scored = kept if score_after_top_k else range(len(row))
        if score == "softmax":
            total = sum(row[i].exp() for i in scored)
            scores = [row[i].exp() / total for i in range(len(row))]
        else:
            scores = [1 / (1 + (-row[i]).exp()) for i in range(len(row))]
        total = sum(scores[i] for i in kept) if normalize else torch.ones_like(row[0])
        gates.append(torch.stack([scores[i] / total if i in kept else row[i] * 0 for i in range(len(row))]))
    return torch.stack(gates)


def keep_within_capacity(
    choices: Sequence[Sequence[int]], num_experts: int, capacity: int, served: Sequence[tuple[int, int]]
) -> set[tuple[int, int]]:
    """Serve (token, choice) pairs in the given order until their expert is full; return the pairs kept."""
    rows = [0] * num_experts
    kept = set()
    for token, choice in served:
        expert = choices[token][choice]
        if rows[expert] < capacity:
            rows[expert] += 1
            kept.add((token, choice))
    return kept


def prioritised(
    served: Sequence[tuple[int, int]], gates: Float[Tensor, "tokens experts"], priority: str
) -> Sequence[tuple[int, int]]:
    """Put (token, choice) pairs in the order of service: https://arxiv.org/abs/2106.05974 section 4."""
    if priority == "arrival":
        return served
    scores = gates.sum(1) if priority == "total-weight" else gates.max(1).values
    return sorted(served, key=lambda pair: (pair[1], -scores[pair[0]].item()))


def cv_squared(values: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    """``(std / mean) ** 2`` with the population's deviation: https://arxiv.org/abs/1701.06538 eq. 7."""
    mean = values.sum() / len(values)
    variance = values.new_zeros(())
    for value in values:
        variance = variance + (value - mean) ** 2 / len(values)
    return variance / (mean**2 + 1e-10)
