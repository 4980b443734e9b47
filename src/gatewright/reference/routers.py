"""Routers in plain loops: the weight of every expert for every token, noise handed in."""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

Level = tuple[Float[Tensor, "tokens _"], Float[Tensor, "tokens _"], Float[Tensor, "tokens _"]]
"""Logits, deviations and noise, as `noisy_top_k` takes them."""


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
            scores = [_score(row[i], score) for i in range(len(row))]
        total = sum(scores[i] for i in kept) if normalize else torch.ones_like(row[0])
        gates.append(torch.stack([scores[i] / total if i in kept else row[i] * 0 for i in range(len(row))]))
    return torch.stack(gates)


def _score(logit: Float[Tensor, ""], score: str) -> Float[Tensor, ""]:
    """The sigmoid, or the square root of ``log(1 + exp(logit))``."""
    return 1 / (1 + (-logit).exp()) if score == "sigmoid" else (1 + logit.exp()).log().sqrt()


def group_limited(
    logits: Float[Tensor, "tokens experts"],
    bias: Float[Tensor, " experts"],
    top_k: int,
    *,
    num_groups: int = 1,
    top_k_groups: int = 1,
    score: str = "sigmoid",
    group_score: str = "two-largest",
    normalize: bool = True,
    scale: float = 1.0,
) -> Float[Tensor, "tokens experts"]:
    """Choose by biased scores in the best groups, weigh without bias: https://arxiv.org/abs/2412.19437 eqs. 13 to 16.

    With one group it is biased top-k alone. Of equal scores the first counts as the larger.
    """
    size, gates = logits.shape[1] // num_groups, []
    for row in logits:
        total = sum(logit.exp() for logit in row)
        scores = [logit.exp() / total if score == "softmax" else _score(logit, score) for logit in row]
        biased = [(scores[i] + bias[i]).item() for i in range(len(row))]
        groups = [sorted(biased[g * size : (g + 1) * size], reverse=True) for g in range(num_groups)]
        values = [group[0] if group_score == "max" else sum(group[:2]) for group in groups]
        best = sorted(range(num_groups), key=lambda g: -values[g])[:top_k_groups]
        allowed = [i for i in range(len(row)) if i // size in best]
        kept = sorted(allowed, key=lambda i: -biased[i])[:top_k]
        divisor = sum(scores[i] for i in kept) if normalize else 1
        gates.append(torch.stack([scale * scores[i] / divisor if i in kept else row[i] * 0 for i in range(len(row))]))
    return torch.stack(gates)


def moved_bias(
    bias: Float[Tensor, " experts"], load: Float[Tensor, " experts"], rate: float
) -> Float[Tensor, " experts"]:
    """``b_i + rate * sign(mean(load) - load_i)``: https://arxiv.org/abs/2408.15664 algorithm 1."""
    mean = sum(load) / len(load)
    return torch.stack([b + rate * (int(mean > n) - int(mean < n)) for b, n in zip(bias, load, strict=True)])


def batchwise_mask(scores: Float[Tensor, "tokens experts"], top_k: int) -> Float[Tensor, "tokens experts"]:
    """1 for the largest scores of each expert, ``m = tokens * top_k / experts`` of them, 0 for the rest.

    https://arxiv.org/abs/1701.06538 appendix F and https://arxiv.org/abs/2202.09368. m is rounded, half up, and is at
    least 1; of equal scores the first ones count.
    """
    num_tokens, num_experts = scores.shape
    count = max(math.floor(num_tokens * top_k / num_experts + 0.5), 1)
    mask = torch.zeros_like(scores)
    for expert in range(num_experts):
        for token in sorted(range(num_tokens), key=lambda token: -scores[token, expert].item())[:count]:
            mask[token, expert] = 1
    return mask


def expert_choice(
    scores: Float[Tensor, "tokens experts"], mask: Float[Tensor, "tokens experts"], *, normalize: bool = False
) -> Float[Tensor, "tokens experts"]:
    """Scores where the mask is 1; normalised, ``G(x)_i = G_i M_i / sum_j G_j M_j`` of 1701.06538 appendix F."""
    gates = []
    for row, chosen in zip(scores, mask, strict=True):
        gates.append(row * chosen / ((row * chosen).sum() if normalize and chosen.any() else 1))
    return torch.stack(gates)


def sinkhorn(
    logits: Float[Tensor, "tokens experts"], tolerance: float, max_iterations: int
) -> Float[Tensor, "tokens experts"]:
    """``Pi = diag(u) exp(logits) diag(v)``: rows to 1 and columns to tokens / experts in turn, then rows once more.

    https://arxiv.org/abs/2202.01169; it ends where no column had to change by more than ``exp(tolerance)``.
    """
    plan, (num_tokens, num_experts) = logits.detach().exp(), logits.shape
    for _ in range(max_iterations):
        plan = torch.stack([row / row.sum() for row in plan])
        factors = [num_tokens / num_experts / column.sum() for column in plan.t()]
        plan = torch.stack([column * factor for column, factor in zip(plan.t(), factors, strict=True)], dim=1)
        if all(abs(factor.log()) <= tolerance for factor in factors):
            break
    return torch.stack([row / row.sum() for row in plan])


def soft(
    x: Float[Tensor, "tokens dim"], phi: Float[Tensor, "dim slots"], scale: Float[Tensor, ""], group_size: int
) -> tuple[Float[Tensor, "tokens slots"], Float[Tensor, "tokens slots"]]:
    """Dispatch and combine weights: https://arxiv.org/abs/2308.00951 eqs. 1 and 2, lengths as in algorithm 2."""
    rows = [row / (row.norm() + 1e-6) for row in x]
    columns = [column / (column.norm() + 1e-6) for column in phi.t()]
    shares = torch.stack([torch.stack([(scale * (row @ column)).exp() for column in columns]) for row in rows])
    dispatch = []
    for token in range(len(x)):
        first = token - token % group_size
        dispatch.append(shares[token] / sum(shares[first : first + group_size]))
    return torch.stack(dispatch), torch.stack([row / row.sum() for row in shares])


def hierarchical(primary: Level, secondary: Level, top_k_groups: int, top_k: int) -> Float[Tensor, "tokens experts"]:
    """``G_primary(x)_i G_i(x)_j``: https://arxiv.org/abs/1701.06538 appendix B."""
    upper, gates = noisy_top_k(*primary, top_k_groups), []
    size = secondary[0].shape[1] // upper.shape[1]
    for group in range(upper.shape[1]):
        logits, noise_std, noise = (values[:, group * size : (group + 1) * size] for values in secondary)
        gates.append(upper[:, group : group + 1] * noisy_top_k(logits, noise_std, noise, top_k // top_k_groups))
    return torch.cat(gates, dim=1)


def hashed(keys: Int[Tensor, "tokens dim"], num_experts: int, top_k: int, seed: int) -> Float[Tensor, "tokens experts"]:
    """1 / k for the experts of the k largest hashes of (seed, key, expert): https://arxiv.org/abs/2106.04426.

    Each number in turn goes into splitmix64, https://doi.org/10.1145/2660193.2660195, in whole numbers of 64 bits.
    """

    def mix(word: int) -> int:
        word = (word ^ word >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        word = (word ^ word >> 27) * 0x94D049BB133111EB % 2**64
        return word ^ word >> 31

    gates = torch.zeros(len(keys), num_experts)
    for token, key in enumerate(keys.tolist()):
        state = mix((seed + 0x9E3779B97F4A7C15) % 2**64)
        for number in key:
            state = mix(state ^ number % 2**64)
        hashes = [(mix(state ^ expert) + 2**63) % 2**64 for expert in range(num_experts)]  # ordered as if signed
        for expert in sorted(range(num_experts), key=lambda i: -hashes[i])[:top_k]:
            gates[token, expert] = 1 / top_k
    return gates


def gated(
    gates: Float[Tensor, "tokens experts"], scores: Float[Tensor, "tokens experts"]
) -> Float[Tensor, "tokens experts"]:
    """Scores of the experts that gates name, over their sum."""
    rows = []
    for gate, score in zip(gates, scores, strict=True):
        total = sum(score[i] for i in range(len(gate)) if gate[i] > 0)
        rows.append(torch.stack([score[i] / total if gate[i] > 0 else score[i] * 0 for i in range(len(gate))]))
    return torch.stack(rows)


def expert_dropout(
    gates: Float[Tensor, "tokens experts"], noise: Float[Tensor, "tokens experts"], rate: float
) -> Float[Tensor, "tokens experts"]:
    """Gates whose uniform noise is below the rate go; the others make up for them: ``gate / (1 - rate)``."""
    rows = [gates[:0]]
    for row, drawn in zip(gates, noise, strict=True):
        rows.append(torch.stack([g * 0 if u < rate else g / (1 - rate) for g, u in zip(row, drawn, strict=True)])[None])
    return torch.cat(rows)
