"""Grouped GEMM against one plain product per group, on poisoned memory."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright.ops import grouped_mm
from gatewright.ops.grouped_mm import _compiled_backward, _compiled_loop

GROUPS = {
    "even": ([3, 3, 3], 0),
    "idle": ([0, 7, 0, 2, 0], 0),
    "dropped": ([2, 0, 3], 4),
    "one": ([0, 9], 0),
    "all-dropped": ([0, 0], 5),
    "one-row": ([0, 1, 0], 0),
    "no-rows": ([0, 0, 0], 0),
}
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 5e-2}


def inputs(counts, dropped, dim, out, dtype):
    """Rows with NaN where they were dropped, and one matrix per group."""
    rows, weight = torch.randn(sum(counts) + dropped, dim, dtype=dtype), torch.randn(len(counts), dim, out, dtype=dtype)
    rows[sum(counts) :] = torch.nan
    return rows.requires_grad_(), weight.requires_grad_(), torch.tensor(counts)


def expected(rows, weight, counts, upstream):
    rows, weight = (tensor.detach().double().requires_grad_() for tensor in (rows, weight))
    *groups, dropped = rows.split([*counts.tolist(), len(rows) - int(counts.sum())])
    products = [group @ matrix for group, matrix in zip(groups, weight, strict=True)]
    output = torch.cat([*products, torch.zeros(len(dropped), weight.shape[2], dtype=torch.float64)])
    gradients = torch.autograd.grad(output, (rows, weight), upstream.double())
    return output, *gradients


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("groups", GROUPS)
def test_it_is_one_product_per_group(groups):
    for (dim, out), dtype in product([(8, 16), (7, 5), (1, 1), (8, 5)], TOLERANCE):
        rows, weight, counts = inputs(*GROUPS[groups], dim, out, dtype)
        output = grouped_mm(rows, weight, counts)
        upstream = torch.randn_like(output)
        upstream[int(counts.sum()) :] = torch.nan  # what comes back to dropped rows is not looked at
        actual = (output, *torch.autograd.grad(output, (rows, weight), upstream))
        for result, wanted in zip(actual, expected(rows, weight, counts, upstream.nan_to_num()), strict=True):
            assert result.dtype == dtype
            assert_close(result.double(), wanted, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype])


@pytest.mark.usefixtures("poisoned")
def test_layouts_other_than_contiguous():
    """Every second row, and matrices stored transposed."""
    for dtype in [torch.float32, torch.float64]:
        rows = torch.randn(10, 16, dtype=dtype)[::2, ::2].requires_grad_()
        weight = torch.randn(2, 12, 8, dtype=dtype).transpose(1, 2).requires_grad_()
        counts = torch.tensor([2, 3])
        output = grouped_mm(rows, weight, counts)
        upstream = torch.randn(1, 1, dtype=dtype).expand(5, 12)
        actual = (output, *torch.autograd.grad(output, (rows, weight), upstream))
        for result, wanted in zip(actual, expected(rows, weight, counts, upstream), strict=True):
            assert_close(result.double(), wanted, rtol=1e-5, atol=1e-5)


def test_the_loop_is_a_well_behaved_operator():
    """Schema, fake tensors, autograd and torch.compile's tracing, as torch checks them."""
    for groups in ["idle", "dropped", "no-rows"]:
        rows, weight, counts = inputs(*GROUPS[groups], 3, 2, torch.float32)
        ends = counts.cumsum(0, dtype=torch.int32)
        with torch.no_grad():
            rows.nan_to_num_()  # opcheck compares with ==
            gradient = torch.randn(len(rows), 2)
        torch.library.opcheck(_compiled_loop, (rows, weight, ends))
        torch.library.opcheck(_compiled_backward, (gradient, rows.detach(), weight.detach(), ends))
