"""Masked items are not routed and not counted. Every router with every dispatch is in `tests/test_promises.py`."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import (
    Capacity,
    GroupedFeedForward,
    MoE,
    NoisyTopK,
    ResidualMixture,
    TopK,
    aux_loss,
    moe_layers,
    reference,
)
from tests.cases import ROUTER_CASES, SOFT_CASES, features_for, make_merged, make_moe, make_router, make_soft_moe
from tests.compare import SEED

LENGTHS = torch.tensor([5, 0, 3])
MASK = torch.arange(5) < LENGTHS[:, None]  # three sequences, one of them empty, padded to five items


def on_padding(layer, x, **options):
    torch.manual_seed(SEED)
    return layer(x, mask=MASK, **options)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("capacity", [None, Capacity(0.5, 1), Capacity(0.5, 1, "largest-weight")])
def test_sequences_of_any_length_are_one_packed_batch(capacity, training):
    moe = MoE(NoisyTopK(8, 4), GroupedFeedForward(4, 8, 16), dispatcher=capacity, shared=nn.Linear(8, 8))
    x = torch.randn(3, 5, 8).masked_fill(~MASK[..., None], torch.nan).requires_grad_()
    output = on_padding(moe.train(training), x)
    dropped, losses = moe.routing.sums.dropped, aux_loss(moe)
    torch.manual_seed(SEED)
    expected = reference.of_real_items(moe, x.flatten(0, 1), MASK.flatten())
    assert_close(output.flatten(0, 1), expected)
    assert torch.equal(output[~MASK], torch.zeros(7, 8))
    assert_close(losses, aux_loss(moe))
    assert moe.routing.sums.num_tokens == 8
    assert dropped == moe.routing.sums.dropped
    assert (dropped > 0) == (training and capacity is not None)
    output.sum().backward()
    assert torch.equal(x.grad[~MASK], torch.zeros(7, 8))
    assert all(parameter.grad.isfinite().all() for parameter in moe.parameters() if parameter.grad is not None)


def layers():
    residual = ResidualMixture(make_moe(), nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    return {"moe": make_moe(), "merged": make_merged(), "residual": residual, "soft": make_soft_moe()}


@pytest.mark.parametrize("kind", layers())
@pytest.mark.parametrize("training", [True, False])
def test_a_batch_of_nothing_but_padding_gives_zeros(kind, training):
    layer = layers()[kind].train(training)
    output = layer(torch.randn(4, 3, 8), mask=torch.zeros(4, 3, dtype=torch.bool))
    (output.sum() + aux_loss(layer)).backward()
    assert not output.any()
    assert all(parameter.grad is None or not parameter.grad.any() for parameter in layer.parameters())
    assert next(moe.routing.sums.num_tokens for _, moe in moe_layers(layer)) == 0


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", ROUTER_CASES)
def test_masked_tokens_are_dropped_assignments_of_a_list_of_the_same_length(case, training):
    """So that shapes do not depend on the mask."""
    router = make_router(case, 8, 9, 2).train(training)
    features, mask = features_for(router, 12), torch.arange(12) % 3 > 0
    routing = router(features, mask=mask)
    assert len(routing.weight) == len(router(features).weight)
    of_masked = ~mask[routing.token_index]
    assert (routing.expert_index[of_masked] == 9).all()
    assert not routing.weight[of_masked].any()
    assert routing.sums.num_tokens == 8
    assert router(features, mask=torch.zeros_like(mask)).sums.tokens_per_expert.sum() == 0


def test_features_of_their_own_are_masked_too():
    moe, x = MoE(TopK(3, 4), GroupedFeedForward(4, 8, 16), item_shape=8), torch.randn(3, 5, 8)
    features = torch.randn(3, 5, 3).masked_fill(~MASK[..., None], torch.nan)
    (on_padding(moe, x, features=features).sum() + aux_loss(moe)).backward()
    assert moe.router.gate.weight.grad.isfinite().all()


@pytest.mark.parametrize("router", ["expert-choice", "sinkhorn", "soft-groups"])
def test_a_masked_step_is_one_graph(run_unhooked, router):
    """Where a batch's other items have a part in a route; elsewhere a mask drops what was chosen without it."""
    run_unhooked(compiles, router)


def compiles(router):
    moe = make_soft_moe(router) if router in SOFT_CASES else make_moe(router, dispatcher="capacity-tight")
    compiled, x = torch.compile(moe, backend="aot_eager", fullgraph=True), torch.randn(15, 8)
    for mask in (MASK.flatten(), ~MASK.flatten()):  # the second without a new graph
        torch.manual_seed(SEED)
        expected = moe(x, mask=mask)
        torch.manual_seed(SEED)
        with torch.compiler.set_stance("fail_on_recompile" if mask[-1] else "default"):
            assert_close(compiled(x, mask=mask), expected)
        aux_loss(moe)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("mask", "found"),
    [(MASK.flatten(), r"torch.bool of shape \(15,\)"), (MASK.float(), r"torch.float32 of shape \(3, 5\)")],
)
def test_a_mask_that_is_not_the_batchs_is_refused(mask, found):
    with pytest.raises(
        ValueError, match=rf"batch dimensions, \(3, 5\), .*; got {found}. .* pass mask=~key_padding_mask"
    ):
        make_moe()(torch.randn(3, 5, 8), mask=mask)
