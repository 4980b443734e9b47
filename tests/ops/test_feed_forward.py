"""The fused feed-forward: the numbers of the way by rows, and when a layer takes it."""

import copy

import pytest
import torch
from torch.testing import assert_close

import gatewright
from gatewright import Capacity, GroupedFeedForward, MoE, TopK
from gatewright.ops import feed_forward
from tests.compare import by_the_layer, by_the_reference, compiled_step, differences, results

SITUATIONS = {
    "usual": (23, 4, 2, 8),
    "rows of no 16 bytes": (23, 4, 2, 7),
    "every expert": (9, 3, 3, 8),
    "idle experts": (2, 9, 1, 8),
    "no tokens": (0, 4, 2, 8),
}


def make(num_experts=4, top_k=2, dim=8, activation="swiglu", **options):
    experts = GroupedFeedForward(num_experts, dim, 2 * dim, activation=activation)
    return MoE(TopK(dim, num_experts, top_k), experts, losses={}, **options)


def by_rows(moe):
    """The same layer, whose experts are called with rows, since a hook is to see them."""
    other = copy.deepcopy(moe)
    other.experts.register_forward_hook(lambda *_: None)
    return other


@pytest.fixture
def fused(monkeypatch):
    """What the fused operator was called with, while it computes as ever."""
    calls, run = [], feed_forward._Routed.forward

    def counted(*inputs):
        calls.append(inputs[1:])
        return run(*inputs)

    monkeypatch.setattr(feed_forward._Routed, "forward", staticmethod(counted))
    return calls


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("activation", ["gelu", "relu", "swiglu"])
@pytest.mark.parametrize("situation", SITUATIONS)
def test_it_computes_what_rows_and_the_reference_do(situation, activation, fused):
    num_tokens, num_experts, top_k, dim = SITUATIONS[situation]
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        moe, x = make(num_experts, top_k, dim, activation).to(dtype), torch.randn(num_tokens, dim, dtype=dtype)
        upstream = torch.randn_like(x)
        found = results(by_the_layer, moe, [x], upstream)
        assert fused
        assert_close(found, results(by_the_layer, by_rows(moe), [x], upstream), rtol=tolerance, atol=tolerance)
        if num_tokens:  # of which the reference makes a stack
            near = differences(found, results(by_the_reference, moe, [x], upstream))
            assert all(difference <= tolerance for difference in near.values())


@pytest.mark.usefixtures("poisoned")
def test_experts_are_computed_in_blocks_that_fit_a_cache(monkeypatch):
    """Whatever the blocks: an expert each, which may be idle, several, or all."""
    moe, x = make(9, 2).double(), torch.randn(23, 8, dtype=torch.float64)
    moe.router.gate.weight.data[3] = -100 * x.mean(0)  # few or no tokens
    expected, sizes = results(by_the_layer, moe, [x], torch.ones_like(x)), []
    for block_bytes in (1, 3000, 10**9):
        monkeypatch.setattr(feed_forward, "BLOCK_BYTES", block_bytes)
        ends = torch.tensor([5, 11, 16, 16, 22, 30, 37, 41, 46])
        sizes.append(len(list(feed_forward._blocks(ends, x.new_empty(46, 32)))))
        assert_close(results(by_the_layer, moe, [x], torch.ones_like(x)), expected, rtol=1e-12, atol=1e-12)
    assert sizes == [9, 5, 1]


def test_bfloat16_is_as_near_as_rows_are():
    moe, x = make(dim=64), torch.randn(256, 64)
    exact = moe(x)
    with torch.autocast("cpu", torch.bfloat16):
        fused, rows = moe(x), by_rows(moe)(x)
    assert fused.dtype == rows.dtype
    assert (fused - exact).norm() <= 1.1 * (rows - exact).norm()


def test_transposed_matrices_are_used_as_they_are_and_so_are_their_gradients(fused):
    """Matrices that another library stores as ``(experts, out, in)`` are not copied, forward or backward."""
    moe, x = make(), torch.randn(9, 8)
    expected = results(by_the_layer, moe, [x], torch.ones_like(x))
    stored = [moe.experts.weight_in, moe.experts.weight_out]
    moe.experts.weight_in, moe.experts.weight_out = (torch.nn.Parameter(each.mT.contiguous().mT) for each in stored)
    moe(x).backward(torch.ones_like(x))
    for name in ("weight_in", "weight_out"):
        parameter = getattr(moe.experts, name)
        assert parameter.data_ptr() in {each.data_ptr() for each in fused[-1][2:4]}
        assert parameter.grad.mT.is_contiguous()
        assert_close(parameter.grad, expected[f"experts.{name}"])


def test_a_frozen_matrix_has_no_gradient_and_the_others_have_theirs():
    moe, x = make(), torch.randn(9, 8)
    other = by_rows(moe)
    for layer in (moe, other):
        layer.experts.weight_in.requires_grad_(False)
        layer(x).sum().backward()
    assert moe.experts.weight_in.grad is None
    assert_close(moe.experts.weight_out.grad, other.experts.weight_out.grad)


@pytest.mark.parametrize(
    ("change", "takes"),
    [
        (lambda moe: moe, True),
        (lambda moe: setattr(moe, "dispatcher", Capacity()), False),
        (lambda moe: (setattr(moe, "dispatcher", Capacity()), moe.eval()), True),
        (lambda moe: moe.experts.register_forward_pre_hook(lambda *_: None), False),
        (lambda moe: setattr(moe.experts, "dropout", 0.1), False),
    ],
    ids=["dropless", "capacity", "capacity in evaluation", "hooks", "dropout"],
)
def test_a_layer_takes_it_where_nobody_is_to_see_rows_and_nothing_is_dropped(change, takes, fused):
    moe = make()
    change(moe)
    moe(torch.randn(9, 8))
    assert bool(fused) == takes


def compiled(dim):
    """Where rows are no multiple of 16 bytes the kernels read lengths, so that tracing into them would fail."""
    torch.manual_seed(0)
    found = compiled_step(make(dim=dim), torch.randn(13, dim), backend="aot_eager", fullgraph=True)
    assert all(difference <= 1e-5 for difference in found.values()), found


def test_it_is_one_operator_of_a_compiled_graph(run_unhooked):
    run_unhooked(compiled, 7)


def compiled_beside_a_dict():
    moe, noted = make(), {}

    def forward(x):
        noted.update(size=x.shape[1])
        return moe(x)

    x = torch.randn(13, 8)
    assert_close(torch.compile(forward, backend="aot_eager", fullgraph=True)(x), moe(x))


def test_it_is_so_in_a_graph_that_changes_a_dict(run_unhooked):
    """As the models of transformers do, after which torch.compile reads no mapping proxy."""
    run_unhooked(compiled_beside_a_dict)


def test_a_backend_that_does_not_take_the_items_says_why(capsys):
    with pytest.raises(ValueError, match="back-end"):
        GroupedFeedForward(2, 8, 8, backend="cutlass")
    moe = make()
    moe.experts.backend = "torch"
    moe(torch.randn(3, 8))
    moe.experts.backend = "triton"
    with pytest.raises(ValueError, match=r"backend='triton' does not take this input: .+ Leave backend out"):
        moe(torch.randn(3, 8))
    gatewright.backends()
    triton, plain, *_ = capsys.readouterr().out.splitlines()
    assert triton.startswith("triton")
    assert plain.split() == ["torch", "available"]
