"""The layer: what it takes, what it returns, and what it says of what it does not take."""

import math

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import Dropless, GroupedFeedForward, ModuleExperts, MoE, NoisyTopK, Soft, TopK, aux_loss, moe_layers
from tests.cases import make_moe, make_router


def images(dim=75):
    """Images of 3 x 5 x 5 in, 10 numbers out."""

    def expert():
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 10))

    return MoE(make_router("top-k", dim, 4, 2), ModuleExperts(expert, 4), item_shape=(3, 5, 5))


@pytest.mark.parametrize("batch", [(5,), (2, 3), (2, 3, 4), (1, 1), (0,), (2, 0)])
def test_leading_dimensions_are_free(batch):
    moe, x = make_moe(), torch.randn(*batch, 8)
    output = moe(x)
    assert output.shape == x.shape
    assert_close(output.reshape(-1, 8), moe(x.reshape(-1, 8)))


def test_an_input_that_is_not_contiguous():
    moe, x = make_moe(), torch.randn(8, 5, 6).transpose(0, 2)
    assert_close(moe(x), moe(x.contiguous()))


@pytest.mark.parametrize(("item_shape", "expected"), [(None, (8,)), (8, (8,)), ((8,), (8,)), ([8], (8,))])
def test_the_item_shape(item_shape, expected):
    moe = MoE(TopK(8, 3, 2), GroupedFeedForward(3, 8, 4), item_shape=item_shape)
    assert moe.item_shape == expected
    assert moe.output_shape == (8,)


def test_the_router_may_look_at_other_features_than_the_items():
    """Images that are routed by four numbers each, of any shape."""
    moe, x, features = images(dim=4).eval(), torch.randn(2, 3, 3, 5, 5), torch.randn(2, 3, 4, requires_grad=True)
    output = moe(x, features)
    routing = moe.router(features.reshape(6, 4))
    weight = torch.zeros(6, 4).index_put((routing.token_index, routing.expert_index), routing.weight)
    every = torch.stack([expert(x.flatten(0, 1)) for expert in moe.experts.experts], 1)
    assert_close(output.flatten(0, 1), (weight[..., None] * every).sum(1))
    assert_close(moe(x, features.view(2, 3, 2, 2)), output)
    output.sum().backward()
    assert features.grad.any()


def test_the_last_routing_is_a_view_without_a_graph():
    moe = make_moe(dispatcher="capacity-tight")
    assert moe.routing is None
    for training in (True, False):
        moe.train(training)(torch.randn(20, 8))
        assert moe.routing.sums.num_tokens == 20
        assert not moe.routing.weight.requires_grad
        assert not moe.routing.sums.probs.requires_grad
        assert (moe.routing.sums.dropped > 0) == training


def test_the_default_dispatcher_and_losses():
    moe = MoE(NoisyTopK(8, 3), GroupedFeedForward(3, 8, 4))
    assert isinstance(moe.dispatcher, Dropless)
    assert moe.losses == {"importance": 0.1, "load": 0.1}
    assert MoE(TopK(8, 3), GroupedFeedForward(3, 8, 4)).losses == {"load_balance": 0.01}
    assert MoE(TopK(8, 3), GroupedFeedForward(3, 8, 4), losses={"router_z": 1e-3}).losses == {"router_z": 1e-3}


def linear(out=8):
    return lambda: nn.Linear(8, out)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MoE(TopK(8, 4), GroupedFeedForward(3, 8, 4)), "chooses among 4 experts and there are 3"),
        (
            lambda: MoE(TopK(7, 3), ModuleExperts(linear(), 3)),
            r"Expert 0 \(Linear\) does not take items of shape \(7,\)",
        ),
        (
            lambda: MoE(TopK(8, 3), GroupedFeedForward(3, 8, 4), losses={"laod": 1.0}),
            "No auxiliary loss is called 'laod'; did you mean 'load'",
        ),
        (
            lambda: MoE(TopK(8, 3), GroupedFeedForward(3, 8, 4), losses={"load": math.nan}),
            "coefficient of an auxiliary loss is finite; got nan for load",
        ),
    ],
)
def test_parts_that_do_not_fit_are_refused_at_construction(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(4, 7), r"items of shape \(8,\) behind one or more batch dimensions; got \(4, 7\)"),
        (torch.zeros(8), r"got \(8,\)"),
        (torch.zeros(4, 8, dtype=torch.int64), r"floating-point items; got torch.int64. Convert with x.float\(\)"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(x, message):
    with pytest.raises(ValueError, match=message):
        make_moe()(x)


@pytest.mark.parametrize("shape", [None, (6, 3), (5, 4), (4,), (4, 6), (24,), (2, 3, 4)])
def test_features_that_do_not_fit_are_refused(shape):
    moe = images(dim=4)
    with pytest.raises(ValueError, match=r"looks at 4 numbers per item, for 6 items; got features of shape \("):
        moe(torch.randn(6, 3, 5, 5), None if shape is None else torch.randn(shape))


def test_items_of_another_type_than_the_experts_are_refused_but_under_autocast():
    moe = make_moe()
    with pytest.raises(
        ValueError, match=r"parameters of torch.float32 and got items of torch.bfloat16. Convert either"
    ):
        moe(torch.randn(4, 8, dtype=torch.bfloat16))
    with torch.autocast("cpu", torch.bfloat16):
        assert moe(torch.randn(4, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("training", [True, False])
def test_a_mixture_may_be_an_expert(training):
    """And any module that looks at values, which the meta device has not."""
    outer = MoE(TopK(8, 3), ModuleExperts(make_moe, 3)).train(training)
    x = torch.randn(16, 8, requires_grad=True)
    output = outer(x)
    (output.sum() + aux_loss(outer)).backward()
    assert output.shape == x.shape
    assert x.grad.any()
    used = outer.routing.sums.tokens_per_expert > 0
    for expert, has_rows in zip(outer.experts.experts, used.tolist(), strict=True):
        assert bool(expert.experts.weight_in.grad.any()) == has_rows


def test_moe_layers_finds_all_and_the_model_itself():
    inner, other = make_moe(), make_moe()
    model = nn.ModuleDict({"block": nn.Sequential(nn.Linear(8, 8), inner), "head": other})
    assert list(moe_layers(model)) == [("block.1", inner), ("head", other)]
    assert list(moe_layers(inner)) == [("", inner)]
    assert list(moe_layers(nn.Linear(2, 2))) == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            (nn.Linear(8, 4), GroupedFeedForward(4, 8, 8)),
            r"MoE takes a gatewright.Router for its router; got Linear. .* such as gatewright.TopK",
        ),
        ((TopK(8, 4), nn.ModuleList([nn.Linear(8, 8)])), r"got ModuleList. Use gatewright.GroupedFeedForward, or wrap"),
        ((TopK(8, 4), [nn.Linear(8, 8)] * 4), r"got list."),
        ((TopK(8, 4), GroupedFeedForward(4, 8, 8), "capacity"), r"got 'capacity'. Leave it out"),
        ((Soft(8, 4), GroupedFeedForward(4, 8, 8)), r"got Soft. SoftMoE takes gatewright.Soft"),
    ],
)
def test_parts_of_another_kind_are_named(unchecked, arguments, says):
    router, experts, *dispatcher = arguments
    with pytest.raises(ValueError, match=says):
        MoE(router, experts, dispatcher=dispatcher[0] if dispatcher else None)


def test_logits_and_probabilities_of_the_last_forward_can_be_read():
    moe, x = make_moe("top-k", top_k=2), torch.randn(2, 3, 8)
    moe(x)
    assert_close(moe.routing.logits, x.flatten(0, 1) @ moe.router.gate.weight.detach().t())
    assert_close(moe.routing.probs, moe.routing.logits.softmax(-1))
    assert not moe.routing.logits.requires_grad


def test_a_loss_of_ones_own_is_a_function():
    def unsure(sums):
        return sums.entropy / sums.num_tokens

    moe = MoE(TopK(8, 4), GroupedFeedForward(4, 8, 8), losses={"load_balance": 0.5, unsure: 0.25})
    moe(torch.randn(6, 8))
    total = aux_loss(moe)
    assert_close(total.detach(), 0.5 * moe.loss_values["load_balance"] + 0.25 * moe.loss_values["unsure"])
    total.backward()
    assert moe.router.gate.weight.grad.any()


def test_losses_of_one_name_are_refused():
    with pytest.raises(ValueError, match="<lambda>, <lambda>"):
        MoE(TopK(8, 4), GroupedFeedForward(4, 8, 8), losses={lambda s: s.entropy: 0.1, lambda s: s.router_z: 0.1})


def test_a_transformers_fast_path_is_told_what_to_do():
    block = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    block.linear1 = MoE(TopK(8, 4), ModuleExperts(lambda: nn.Linear(8, 16), 4))
    assert not hasattr(block.linear1, "weight")
    x = torch.randn(2, 3, 8)
    assert block(x).shape == x.shape
    with torch.no_grad(), pytest.raises(AttributeError, match=r"set_fastpath_enabled\(False\)"):
        block.eval()(x)
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        assert block(x).shape == x.shape
    finally:
        torch.backends.mha.set_fastpath_enabled(True)
