"""What every kind of experts keeps to. A new one in `EXPERTS` is run through all of it."""

import copy

import pytest
import torch
from torch.testing import assert_close

from gatewright.experts import EXPERTS
from tests.cases import EXPERT_CASES
from tests.references import one_by_one

DIMS = (8, 7)  # rows of 16 bytes, which torch's grouped GEMM takes, and others
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
dims = pytest.mark.parametrize("dim", DIMS)
groups = pytest.mark.parametrize("groups", GROUPS)


def inputs(counts, dropped, dim):
    """Rows with NaN where they were dropped."""
    rows = torch.randn(sum(counts) + dropped, dim)
    rows[sum(counts) :] = torch.nan
    return rows.requires_grad_(), torch.tensor(counts)


@dims
@groups
def test_each_group_goes_to_its_expert_and_dropped_rows_give_zeros(case, dim, groups):
    experts = EXPERT_CASES[case](3, dim)
    rows, counts = inputs(*GROUPS[groups], dim)
    output = experts(rows, counts)
    *parts, dropped = rows.split([*counts.tolist(), GROUPS[groups][1]])
    expected = [expert(part) for expert, part in zip(one_by_one(experts), parts, strict=True) if len(part)]
    assert_close(output, torch.cat([*expected, torch.zeros(dropped.shape)]), rtol=1e-5, atol=1e-6)


@dims
@groups
def test_gradients_are_zero_for_the_idle_and_the_dropped_and_never_none(case, dim, groups):
    experts = EXPERT_CASES[case](3, dim)
    rows, counts = inputs(*GROUPS[groups], dim)
    output = experts(rows, counts)
    upstream = torch.randn_like(output)
    upstream[int(counts.sum()) :] = torch.nan
    output.backward(upstream)
    plain = copy.deepcopy(experts)
    plain.zero_grad()
    *parts, _ = rows.detach().split([*counts.tolist(), GROUPS[groups][1]])
    used = [(expert, part) for expert, part in zip(one_by_one(plain), parts, strict=True) if len(part)]
    if used:
        torch.cat([expert(part) for expert, part in used]).backward(upstream[: int(counts.sum())])
    for parameter, expected in zip(experts.parameters(), plain.parameters(), strict=True):
        wanted = torch.zeros_like(parameter) if expected.grad is None else expected.grad
        assert_close(parameter.grad, wanted, rtol=1e-4, atol=1e-5)
    assert not rows.grad[int(counts.sum()) :].any()
    assert rows.grad.isfinite().all()


@dims
def test_a_frozen_expert_gets_no_gradient(case, dim):
    experts = EXPERT_CASES[case](3, dim)
    next(experts.parameters()).requires_grad_(False)
    rows, counts = inputs([0, 4, 2], 0, dim)
    experts(rows, counts).sum().backward()
    first, *rest = experts.parameters()
    assert first.grad is None
    assert all(parameter.grad is not None for parameter in rest)


@dims
@groups
def test_without_gradients_the_output_is_the_same(case, dim, groups):
    experts = EXPERT_CASES[case](3, dim)
    rows, counts = inputs(*GROUPS[groups], dim)
    expected = experts(rows, counts)
    with torch.inference_mode():
        output = experts(rows.detach(), counts)
    assert torch.equal(output, expected)
    assert not output.requires_grad


@dims
def test_the_output_shape_is_known_beforehand(case, dim):
    experts = EXPERT_CASES[case](3, dim)
    assert experts.output_shape((dim,)) == tuple(experts(*inputs([2, 0, 1], 0, dim)).shape[1:])


@dims
def test_items_of_another_shape_are_refused(case, dim):
    with pytest.raises(ValueError, match=rf"items of shape \({dim + 1},\)|got \({dim + 1},\)"):
        EXPERT_CASES[case](3, dim).output_shape((dim + 1,))


@dims
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(case, dim, dtype):
    experts = EXPERT_CASES[case](3, dim)
    rows, counts = inputs([2, 0, 3], 0, dim)
    expected = experts(rows, counts)
    output = experts.to(dtype)(rows.to(dtype), counts)
    assert output.dtype == dtype
    assert_close(output.float(), expected, rtol=0.05, atol=0.05)


@dims
@pytest.mark.parametrize("counts", [[2, 0, 3], [0, 0, 5]])
def test_autocast_gives_its_type_and_float32_gradients(case, dim, counts):
    experts = EXPERT_CASES[case](3, dim)
    rows, counts = inputs(counts, 0, dim)
    expected = experts(rows, counts)
    with torch.autocast("cpu", torch.bfloat16):
        output = experts(rows, counts)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    assert {parameter.grad.dtype for parameter in experts.parameters()} == {torch.float32}


@dims
def test_experts_differ_from_the_start(case, dim):
    """Copies of one expert would all learn the same."""
    experts = EXPERT_CASES[case](3, dim)
    output = experts(torch.ones(3, dim), torch.tensor([1, 1, 1]))
    assert not torch.allclose(output[0], output[1])
    assert not torch.allclose(output[1], output[2])


@dims
def test_copies_and_loaded_state_compute_alike(case, dim):
    experts, other = EXPERT_CASES[case](3, dim), EXPERT_CASES[case](3, dim)
    rows, counts = inputs([2, 0, 3], 2, dim)
    other.load_state_dict(experts.state_dict())
    for twin in (other, copy.deepcopy(experts)):
        assert torch.equal(twin(rows, counts), experts(rows, counts))


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
