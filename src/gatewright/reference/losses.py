"""What the balance losses are made of, one expert at a time."""

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.reference.routers import Level, batchwise_mask, load_probability, noisy_top_k


def cv_squared(values: Float[Tensor, " experts"]) -> Float[Tensor, ""]:
    """``(std / mean) ** 2`` with the population's deviation: https://arxiv.org/abs/1701.06538 eq. 7."""
    mean = values.sum() / len(values)
    variance = values.new_zeros(())
    for value in values:
        variance = variance + (value - mean) ** 2 / len(values)
    return variance / (mean**2 + 1e-10)


def threshold_loss(
    scores: Float[Tensor, "tokens experts"], threshold: Float[Tensor, " experts"], top_k: int
) -> Float[Tensor, ""]:
    """``sum (M_threshold - M_batchwise) (X - T)`` of constant scores X: https://arxiv.org/abs/1701.06538 appendix F."""
    loss = threshold.new_zeros(())
    for row, chosen in zip(scores.detach(), batchwise_mask(scores, top_k), strict=True):
        for score, limit, taken in zip(row, threshold, chosen, strict=True):
            loss = loss + (int(score > limit) - taken) * (score - limit)
    return loss


def hierarchical_load(primary: Level, secondary: Level, top_k_groups: int, top_k: int) -> Float[Tensor, " experts"]:
    """``Load_primary(X)_i Load_i(X_i)_j / |X_i|``: appendix B again; X_i are the tokens that chose group i."""
    upper, group_load = noisy_top_k(*primary, top_k_groups), load_probability(*primary, top_k_groups).sum(0)
    size, loads = secondary[0].shape[1] // upper.shape[1], []
    for group in range(upper.shape[1]):
        sent = [token for token in range(len(upper)) if upper[token, group] != 0]
        logits, noise_std, noise = (values[sent, group * size : (group + 1) * size] for values in secondary)
        lower = load_probability(logits, noise_std, noise, top_k // top_k_groups).sum(0) if sent else logits.sum(0) * 0
        loads.append(group_load[group] * lower / max(len(sent), 1))
    return torch.cat(loads)
