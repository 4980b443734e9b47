"""Who is served where an expert is full, one assignment at a time."""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

PRIORITY_BITS = 16  # Weights that differ by less are equal: sums of normalised weights differ by rounding.


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
    return sorted(served, key=lambda pair: (pair[1], -round(scores[pair[0]].item() * 2**PRIORITY_BITS)))
