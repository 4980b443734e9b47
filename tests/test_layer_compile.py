"""Layers under torch.compile: outputs and gradients are those of eager mode.

Each check runs in a process without the import hook (see `run_unhooked` in conftest.py).
"""

import copy
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.testing import assert_close

from gatewright import Capacity, GroupedFeedForward, ModuleExperts, MoE, aux_loss
from tests import compare
from tests.cases import SOFT_CASES, make_moe, make_router, make_soft_moe
from tests.compare import compiled_step, step


def agrees_with_eager(moe, x, autocast=False, **options):
    tolerance = 0.05 if autocast else 1e-5
    for name, difference in compiled_step(moe, x, autocast, **options).items():
        assert difference <= tolerance, (name, difference)
    assert moe.routing.sums.num_tokens == len(x)


def grouped(router, dispatcher, dim, autocast):
    torch.manual_seed(0)
    moe = make_moe(router, "grouped-swiglu-bias", dispatcher, dim=dim)
    agrees_with_eager(moe, torch.randn(13, dim), autocast, backend="aot_eager", fullgraph=True)


@pytest.mark.parametrize(
    ("router", "dispatcher", "dim", "autocast"),
    [("noisy-top-k", "capacity", 7, False), ("expert-choice-normalized", "dropless", 8, True)],
)
def test_grouped_experts_are_one_graph(run_unhooked, router, dispatcher, dim, autocast):
    """Every router at one size is in `tests/promises`; here are odd sizes, autocast and gated experts."""
    run_unhooked(grouped, router, dispatcher, dim, autocast)


def modules():
    """The first expert drops rows, the second one gets one row, and the last one is idle."""
    torch.manual_seed(0)
    experts = [nn.Sequential(nn.Linear(8, 5), nn.BatchNorm1d(5)), nn.Linear(8, 5, bias=False), nn.Linear(8, 5)]
    moe = MoE(make_router("top-k", 8, 3, 1), ModuleExperts(experts), dispatcher=Capacity(0.8, 2))
    x = torch.randn(13, 8)
    x[:, :2] = torch.tensor([1.0, -1.0])
    x[6, 1] = 1
    with torch.no_grad():
        moe.router.gate.weight.zero_()[0, 0] = 5
        moe.router.gate.weight[1, 1] = 20
    agrees_with_eager(moe, x, backend="aot_eager")
    sums = moe.routing.sums
    assert (sums.tokens_per_expert.tolist(), sums.dropped) == ([12, 1, 0], 8)


def test_module_experts_break_the_graph_and_agree(run_unhooked):
    run_unhooked(modules)


def sizes(router, group_size):
    torch._dynamo.reset()
    torch.manual_seed(0)
    counter = CompileCounter()
    moe = make_soft_moe(router) if router in SOFT_CASES else make_moe(router)
    moe.losses.clear()
    compiled = torch.compile(moe.eval(), backend=counter, fullgraph=True)
    for num_groups in (4, 5, 6, 63, 17, 1, 0):
        x = torch.randn(num_groups * group_size, 8)
        assert_close(compiled(x), moe(x))
    assert counter.frame_count <= 4, "a graph per batch size"


@pytest.mark.parametrize(("router", "group_size"), [("top-k", 1), ("soft-groups", 3)])
def test_one_graph_serves_batches_of_all_sizes(run_unhooked, router, group_size):
    """The first two sizes, one group and none: a batch of 6, 63 or 17 is compiled no more."""
    run_unhooked(sizes, router, group_size)


def crowded():
    torch.manual_seed(0)
    moe = MoE(make_router("top-k", 8, 20, 1), GroupedFeedForward(20, 8, 4), dispatcher=Capacity(1.0, 1))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        agrees_with_eager(moe, torch.randn(13, 8), backend="aot_eager", fullgraph=True)
    return [(warning.filename, warning.lineno) for warning in caught if "1 row per expert" in str(warning.message)]


def test_a_capacity_that_would_warn_is_one_graph_too_and_eager_mode_says_on_which_line(run_unhooked):
    ((file, line),) = run_unhooked(crowded)
    assert file == compare.__file__
    assert Path(file).read_text().splitlines()[line - 1].strip() == "output = forward(*arguments(layer, x))"


def forgotten():
    torch.manual_seed(0)
    moe = make_moe("noisy-top-k")
    compiled = torch.compile(copy.deepcopy(moe), backend="aot_eager")
    try:
        compiled(torch.randn(13, 8)).sum().backward()
    except RuntimeError as error:
        return str(error)


def test_forgetting_the_loss_fails_in_backward(run_unhooked):
    assert "backward ran before this MoE layer's auxiliary loss was taken" in run_unhooked(forgotten)


def whole_step():
    """The loss is taken inside the compiled function too."""
    torch.manual_seed(0)
    moe, x = make_moe("noisy-top-k"), torch.randn(13, 8)
    other = copy.deepcopy(moe)

    def loss_of(model, x):
        return model(x).square().sum() + aux_loss(model)

    losses = []
    for function, model in ((loss_of, other), (torch.compile(loss_of, backend="aot_eager"), moe)):
        torch.manual_seed(1)
        losses.append(function(model, x))
        losses[-1].backward()
    assert_close(*losses)
    for actual, expected in zip(moe.parameters(), other.parameters(), strict=True):
        assert_close(actual.grad, expected.grad, rtol=1e-5, atol=1e-5)


def test_the_loss_may_be_taken_inside(run_unhooked):
    run_unhooked(whole_step)


def checkpointed():
    torch.manual_seed(0)
    moe, x = make_moe("noisy-top-k"), torch.randn(13, 8)
    other = copy.deepcopy(moe)
    expected = step(other, other, x)

    @torch.compile(backend="aot_eager")
    def model(x):
        return torch.utils.checkpoint.checkpoint(moe, x, use_reentrant=False)

    for name, value in step(model, moe, x).items():
        assert_close(value, expected[name], rtol=1e-5, atol=1e-5)
    assert aux_loss(moe) == 0


def test_checkpointing_inside(run_unhooked):
    run_unhooked(checkpointed)


def inductor():
    torch.manual_seed(0)
    options = {"fallback_random": True}  # eager's noise
    agrees_with_eager(make_moe("noisy-top-k"), torch.randn(13, 8), fullgraph=True, options=options)


@pytest.mark.slow  # It waits for a C++ compiler; what comes before code generation is in the tests above.
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="torch's inductor needs a C++ compiler")
def test_inductor(run_unhooked):
    run_unhooked(inductor)
