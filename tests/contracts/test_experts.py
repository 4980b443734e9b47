"""What every kind of experts keeps to. A new one in `EXPERTS` is run through all of it."""

import copy

import pytest
import torch
from torch.testing import assert_close

from gatewright.experts import EXPERTS
from tests.cases import EXPERT_CASES
from tests.references import one_by_one

GROUPS = {
    "even": ([3, 3, 3], 0),
    "idle": ([0, 5, 2], 0),
    "dropped": ([2, 0, 3], 4),
    "one-takes-all": ([0, 0, 9], 0),
    "one-row": ([0, 1, 0], 0),
    "all-dropped": ([0, 0, 0], 3),
    "no-rows": ([0, 0, 0], 0),
}

pytestmark = [pytest.mark.parametrize("case", EXPERT_CASES), pytest.mark.usefixtures("poisoned")]
dims = pytest.mark.parametrize("dim", [8, 7])  # rows of 16 bytes, which torch's grouped GEMM takes, and others


def inputs(counts, dropped, dim):
    """Rows with NaN where they were dropped."""
    rows = torch.randn(sum(counts) + dropped, dim)
    rows[sum(counts) :] = torch.nan
    return rows.requires_grad_(), torch.tensor(counts)


@dims
def test_each_group_goes_to_its_expert_with_gradients_and_the_rest_is_zero_and_never_none(case, dim):
    """Of idle experts and dropped rows both output and gradients are zero; without gradients the output is the same."""
    for name, (counts, num_dropped) in GROUPS.items():
        experts = EXPERT_CASES[case](3, dim)
        rows, tokens_per_expert = inputs(counts, num_dropped, dim)
        output, kept = experts(rows, tokens_per_expert), sum(counts)
        upstream = torch.randn_like(output)
        upstream[kept:] = torch.nan
        output.backward(upstream)
        plain = copy.deepcopy(experts)
        plain.zero_grad()
        pairs = zip(one_by_one(plain), rows.detach()[:kept].split(counts), strict=True)
        expected = [expert(part) for expert, part in pairs if len(part)]
        wanted = torch.cat([*expected, torch.zeros(num_dropped, dim)])
        assert_close(output, wanted, rtol=1e-5, atol=1e-6, msg=name)
        if expected:
            wanted[:kept].backward(upstream[:kept])
        for parameter, alone in zip(experts.parameters(), plain.parameters(), strict=True):
            gradient = torch.zeros_like(parameter) if alone.grad is None else alone.grad
            assert_close(parameter.grad, gradient, rtol=1e-4, atol=1e-5)
        assert not rows.grad[kept:].any()
        assert rows.grad.isfinite().all()
        with torch.inference_mode():
            assert torch.equal(experts(rows.detach(), tokens_per_expert), output)


def test_a_frozen_expert_gets_no_gradient(case):
    experts = EXPERT_CASES[case](3, 8)
    next(experts.parameters()).requires_grad_(False)
    rows, counts = inputs([0, 4, 2], 0, 8)
    experts(rows, counts).sum().backward()
    first, *rest = experts.parameters()
    assert first.grad is None
    assert all(parameter.grad is not None for parameter in rest)


@dims
def test_the_output_shape_is_known_beforehand_and_other_items_are_refused(case, dim):
    experts = EXPERT_CASES[case](3, dim)
    assert experts.output_shape((dim,)) == tuple(experts(*inputs([2, 0, 1], 0, dim)).shape[1:])
    with pytest.raises(ValueError, match=rf"items of shape \({dim + 1},\)|got \({dim + 1},\)"):
        experts.output_shape((dim + 1,))


@dims
def test_other_types_and_autocast_with_float32_gradients(case, dim):
    experts = EXPERT_CASES[case](3, dim)
    for counts in ([2, 0, 3], [0, 0, 5]):
        rows, tokens_per_expert = inputs(counts, 0, dim)
        experts.zero_grad()
        expected = experts(rows, tokens_per_expert)
        with torch.autocast("cpu", torch.bfloat16):
            cast = experts(rows, tokens_per_expert)
        cast.float().sum().backward()
        assert {parameter.grad.dtype for parameter in experts.parameters()} == {torch.float32}
        outputs = {torch.bfloat16: [cast]}
        for dtype in (torch.float64, torch.bfloat16):
            other = copy.deepcopy(experts).to(dtype)
            outputs.setdefault(dtype, []).append(other(rows.to(dtype), tokens_per_expert))
        for dtype, found in outputs.items():
            for output in found:
                assert output.dtype == dtype
                assert_close(output.float(), expected, rtol=0.05, atol=0.05)


def test_experts_differ_from_the_start(case):
    """Copies of one expert would all learn the same."""
    output = EXPERT_CASES[case](3, 8)(torch.ones(3, 8), torch.tensor([1, 1, 1]))
    assert not torch.allclose(output[0], output[1])
    assert not torch.allclose(output[1], output[2])


def test_every_registered_kind_has_cases(case):
    assert {type(build(2, 4)) for build in EXPERT_CASES.values()} >= set(EXPERTS.values())
    assert EXPERT_CASES[case](2, 4).num_experts == 2


def test_a_run_of_the_experts_that_is_kept_computes_what_it_did(case):
    """What a process does with those that live elsewhere."""
    experts = EXPERT_CASES[case](5, 8)
    rows, counts = torch.randn(6, 8), torch.tensor([0, 1, 3, 2, 0])
    expected = experts(rows, counts)
    names = dict(experts.named_parameters())
    experts.keep(1, 4)
    assert experts.num_experts == 3
    assert_close(experts(rows, counts[1:4]), expected)
    assert set(dict(experts.named_parameters())) <= set(names)
