"""How many rows each expert's group is padded to, so that neighbours can be multiplied in one batched product."""

from itertools import accumulate

import torch
from jaxtyping import Float, Int
from torch import Tensor

from gatewright.kernels.plain import experts_per_product

FREE_ROWS = 16
"""Rows up to which a product takes as long as reading its matrix does."""
MOST_ADDED = 4
"""Padded groups have at most so many times the rows, whose memory counts too."""


def padded_lengths(tokens_per_expert: list[int], inner: int, out: int, itemsize: int) -> list[int]:
    """Return the rows that each expert's group is padded to; a group that is not keeps its length.

    Neighbours are padded to the longest of their groups where the multiplications that this adds take less time than
    it takes to begin a product per expert, in place of one batched product for all. The rule depends on these sizes
    alone. What a beginning costs was measured on 2 cores of an Intel Xeon with AMX and torch 2.13, and the table is in
    ``docs/experts/grouped.md``. In half precision lengths are then rounded up, since there oneDNN compiles a program
    for every shape that it has not met, which takes longer than the product.

    Args:
        tokens_per_expert: Number of rows of each expert.
        inner: Numbers in a row before the product.
        out: Numbers in a row behind it.
        itemsize: Bytes of a number.
    """
    to_begin = 24e6 if itemsize == 2 else 3e6  # multiplications
    size = experts_per_product(sum(tokens_per_expert) / len(tokens_per_expert))
    lengths: list[int] = []
    for start in range(0, len(tokens_per_expert), size):
        run = tokens_per_expert[start : start + size]
        rows, padded = (sum(max(length, FREE_ROWS) for length in each) for each in (run, [max(run)] * len(run)))
        worthwhile = padded <= MOST_ADDED * rows and (padded - rows) * inner * out <= to_begin * (len(run) - 1)
        lengths += [max(run)] * len(run) if worthwhile else run
    return [round_up(length) for length in lengths] if itemsize == 2 else lengths


def round_up(length: int) -> int:
    """Return a length that few others share with at most a sixteenth more: 16 for each power of two, multiples of 8."""
    step = max(8, 1 << max(length.bit_length() - 5, 0))
    return -(-length // step) * step


def pad(
    weight: Float[Tensor, " assignments"],
    token_index: Int[Tensor, " assignments"],
    row_index: Int[Tensor, "top_k tokens"],
    tokens_per_expert: Int[Tensor, " experts"],
    expert_index: Int[Tensor, " assignments"],
    matrices: Float[Tensor, "experts inner out"],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Pad the groups of assignments on a CPU, by assignments of weight 0 that no token asks for.

    A compiled program does not, since it cannot know how many there are.

    Args:
        weight: The weight of each assignment, sorted by expert.
        token_index: The token of each.
        row_index: The places of each token's assignments in this order.
        tokens_per_expert: Number of assignments of each expert.
        expert_index: The expert of each assignment.
        matrices: What their rows are multiplied by.

    Returns:
        Weights, tokens, places and how many assignments each expert has, of the padded groups.
    """
    if matrices.device.type != "cpu" or torch.compiler.is_compiling():
        return weight, token_index, row_index, tokens_per_expert
    counts, (_, inner, out) = tokens_per_expert.tolist(), matrices.shape
    lengths = padded_lengths(counts, inner, out, matrices.itemsize)
    if lengths == counts:
        return weight, token_index, row_index, tokens_per_expert
    moved = [0, *accumulate(length - count for length, count in zip(lengths, counts, strict=True))][:-1]
    place = torch.arange(len(expert_index)) + torch.tensor(moved).index_select(0, expert_index)
    num_rows = sum(lengths)
    return (
        weight.new_zeros(num_rows).index_copy(0, place, weight),
        token_index.new_zeros(num_rows).index_copy(0, place, token_index),
        place.index_select(0, row_index.flatten()).view_as(row_index),
        torch.tensor(lengths),
    )
