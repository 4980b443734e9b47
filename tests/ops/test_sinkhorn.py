"""Sinkhorn's iteration against plain loops, its marginals, and its corners."""

from itertools import product

import torch
from torch.testing import assert_close

from gatewright import reference
from gatewright.ops import sinkhorn
from gatewright.ops.sinkhorn import _compiled_sinkhorn

SKEWED = {"even": (1.0, 0.0), "skewed": (1.0, 5.0), "sharp": (8.0, 0.0), "sharp-skewed": (4.0, 20.0)}


def skewed_logits(name, num_tokens=63, num_experts=7):
    """Normal logits of a size, and a liking for some experts."""
    scale, skew = SKEWED[name]
    logits = scale * torch.randn(num_tokens, num_experts, dtype=torch.float64)
    return logits + skew * torch.randn(num_experts, dtype=torch.float64)


def test_it_is_the_references_plan():
    """The loops multiply rows and columns of Pi; equal to rounding, so both end after the same iteration."""
    for name, (num_tokens, num_experts), (tolerance, max_iterations) in product(
        SKEWED, [(63, 7), (5, 9), (1, 4), (6, 1)], [(1e-3, 100), (1e-6, 7), (0.5, 100), (1e-3, 1)]
    ):
        logits = skewed_logits(name, num_tokens, num_experts)
        plan = (logits + sinkhorn(logits, tolerance, max_iterations)).softmax(-1)
        assert_close(plan, reference.sinkhorn(logits, tolerance, max_iterations), rtol=1e-9, atol=1e-12)


def test_columns_sum_to_tokens_over_experts():
    """Rows do exactly, by the softmax."""
    for name, tolerance in product(SKEWED, [1e-1, 1e-3, 1e-6]):
        logits = skewed_logits(name)
        columns = (logits + sinkhorn(logits, tolerance, 10_000)).softmax(-1).sum(0)
        assert (columns / 9).log().abs().max() <= tolerance
        assert (logits.softmax(-1).sum(0) / 9).log().abs().max() > 0.1


def test_extreme_logits_stay_finite():
    for dtype in [torch.float32, torch.float64]:
        logits = torch.tensor([[1e4, 0.0, -1e4]] * 5 + [[-1e4, 0.0, 1e4]], dtype=dtype)
        log_v = sinkhorn(logits)
        assert log_v.dtype == dtype
        assert log_v.isfinite().all()


def test_no_tokens_and_one_expert_need_nothing():
    assert torch.equal(sinkhorn(torch.zeros(0, 3)), torch.zeros(3))
    assert torch.equal(sinkhorn(torch.randn(6, 1)), torch.zeros(1))


def test_it_has_no_gradient():
    assert not sinkhorn(torch.randn(6, 3, requires_grad=True)).requires_grad


def test_it_is_a_well_behaved_operator():
    """Schema, fake tensors and torch.compile's tracing, as torch checks them."""
    for num_tokens in [0, 9]:
        torch.library.opcheck(_compiled_sinkhorn, (torch.randn(num_tokens, 4), 1e-3, 100))
