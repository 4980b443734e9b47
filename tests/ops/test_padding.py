"""Which groups are padded, and that padding changes no result."""

import torch
from torch.testing import assert_close

from gatewright.ops import pad, routed_feed_forward
from gatewright.ops.feed_forward import specification
from gatewright.ops.padding import padded_lengths


def test_neighbours_are_padded_where_a_batched_product_takes_less_time():
    for counts, sizes, itemsize, expected in [
        ([5, 9, 0, 12], (512, 2048), 4, [12] * 4),  # Few rows: reading the matrices is what takes time.
        ([20, 30, 25, 28], (64, 64), 4, [30] * 4),  # Small products, which take long to begin.
        ([900, 1100, 1000, 1050], (512, 2048), 4, [900, 1100, 1000, 1050]),
        ([60, 70, 64, 80], (512, 1024), 4, [60, 70, 64, 80]),
        ([60, 70, 64, 80], (512, 1024), 2, [80] * 4),  # Which begin more slowly in half precision.
        ([1030, 1100], (192, 384), 2, [1152] * 2),  # Lengths that come again, so that their programs do.
        ([0, 0, 0, 0, 400], (8, 8), 2, [0, 0, 0, 0, 400]),  # One takes all.
        ([1100, *[1000] * 7, 10, 12], (8, 8), 4, [1100] * 8 + [12] * 2),  # A run of eight, and another one.
        ([0, 0], (8, 8), 4, [0, 0]),
        ([7], (8, 8), 4, [7]),
    ]:
        assert padded_lengths(counts, *sizes, itemsize) == expected


def inputs(counts, dim, ffn):
    expert = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    num_tokens = len(expert) // 2
    token = torch.arange(len(expert))[torch.randperm(len(expert))] % num_tokens
    row_index = token.argsort(stable=True).view(num_tokens, 2).t().contiguous()
    shapes = (num_tokens, dim), (len(counts), dim, 2 * ffn), (len(counts), ffn, dim), (len(expert),)
    parts = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return parts, token, expert, row_index, torch.tensor(counts)


def test_every_way_computes_the_same(monkeypatch):
    """A product per expert, a batch of all experts, and batches of neighbours: outputs and gradients."""
    counts = [3, 0, 7, 4, 0, 0, 5, 9, 2, 2]
    parts, token, expert, row_index, tokens_per_expert = inputs(counts, 6, 5)
    upstream = torch.randn_like(parts[0])
    expected = specification(*parts, token, tokens_per_expert.cumsum(0, dtype=torch.int32), "swiglu")
    expected = [expected, *torch.autograd.grad(expected, parts, upstream)]
    for lengths in (counts, [9] * 10, [7] * 4 + [9] * 6, [*counts[:6], 9, 9, 2, 2]):
        monkeypatch.setattr("gatewright.ops.padding.padded_lengths", lambda *_, found=lengths: found)
        *matrices, weight = parts
        padded = pad(weight, token, row_index, tokens_per_expert, expert, matrices[1])
        output = routed_feed_forward(*matrices, *padded, "swiglu")
        assert_close([output, *torch.autograd.grad(output, parts, upstream)], expected)
