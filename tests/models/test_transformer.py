"""The transformer: causal, blind to what it is packed with, and as much arithmetic as its dense twin."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from gatewright import aux_loss, moe_layers
from gatewright.models import TransformerConfig
from gatewright.models.transformer import CAUSAL_ROUTERS
from tests.cases import dense_weights

BEGIN = 10
SMALL = TransformerConfig(num_layers=2, dim=16, num_heads=2, num_experts=4, top_k=2)


def build(**changes):
    return replace(SMALL, **changes).build(11, 10, BEGIN)


def spread(model):
    """Make gates choose, and weigh, by more than their small first weights."""
    for _, layer in moe_layers(model):
        if getattr(layer.router, "gate", None) is not None:
            torch.nn.init.normal_(layer.router.gate.weight)
    return model


@pytest.mark.parametrize("router", sorted({*CAUSAL_ROUTERS} - {"group-limited", "hierarchical"}))
def test_a_prediction_depends_on_no_later_token_and_on_nothing_else_in_the_batch(router):
    model = spread(build(router=router)).eval()
    tokens = torch.randint(0, 10, (3, 7))
    changed = tokens.clone()
    changed[0, 4:], changed[1:] = torch.randint(0, 10, (3,)), torch.randint(0, 10, (2, 7))
    with torch.no_grad():
        logits, again = model(tokens), model(changed)
    assert_close(again[0, :4], logits[0, :4], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(again[0, 4:], logits[0, 4:])


def test_packed_documents_are_read_as_each_is_alone():
    model = spread(build()).eval()
    first, second = torch.randint(0, 10, (5,)), torch.randint(0, 10, (4,))
    begin = torch.tensor([BEGIN])
    packed = torch.cat([begin, first, begin, second])[None]
    with torch.no_grad():
        alone = torch.cat([model(torch.cat([begin, document])[None])[0] for document in (first, second)])
        assert_close(model(packed)[0], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("router", ["top-k", "hashed"])
def test_the_dense_twin_does_the_same_arithmetic(router):
    """Per token and layer, all that a mixture does more is its gate; a hash has none."""
    tokens = torch.randint(0, 10, (2, 8))

    def flops(model):
        grouped = (torch.ops.aten._grouped_mm, torch.ops.gatewright.grouped_mm_loop)
        rows = {op: lambda rows, weight, *_, **__: 2 * rows[0] * weight[1] * weight[2] for op in grouped}
        for _, layer in moe_layers(model):
            layer.experts.backend = "torch"  # which multiplies no padding
        with FlopCounterMode(display=False, custom_mapping=rows) as counter, torch.no_grad():
            model.eval()(tokens)
        return counter.get_total_flops()

    gates = 0 if router == "hashed" else 2 * tokens.numel() * 2 * 16 * 4
    assert flops(build(router=router)) - gates == flops(build(num_experts=1))
    assert not list(moe_layers(build(num_experts=1)))


@pytest.mark.parametrize("router", ["top-k", "hashed", "gated-hash"])
def test_every_parameter_learns(router):
    model = spread(build(router=router, top_k=4 if router == "top-k" else 2))
    tokens = torch.randint(0, 11, (8, 12))
    loss = F.cross_entropy(model(tokens).flatten(0, 1), torch.randint(0, 10, (96,)))
    (loss + aux_loss(model)).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_first_layers_may_choose_by_the_token_and_weigh_by_a_gate():
    model, tokens = spread(build(hashed_layers=1, losses={"load_balance": 0.1})), torch.tensor([[4, 7, 4], [7, 4, 4]])
    model(tokens)
    (_, first), (_, second) = moe_layers(model)
    by_token = first.routing.expert_index.view(2, 6).sort(0).values[:, tokens.flatten() == 4]
    assert (by_token == by_token[:, :1]).all()
    weights = first.routing.weight
    assert len(set(weights.tolist())) > 4  # and not one for each token's identity
    assert (first.losses, second.losses) == ({}, {"load_balance": 0.1})
    assert type(second.router).__name__ == "TopK"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 18}, "`model.dim` is a multiple of twice `model.num_heads`; got 18 and 2"),
        ({"top_k": 3}, "`model.top_k` divides `model.ffn`, .* got 3 and 64"),
        (
            {"router": "sinkhorn"},
            "the router sinkhorn compares or mixes .* Set `model.router` to one of .* top-k, hashed",
        ),
        ({"router": "hashd"}, "No router of a language model is called 'hashd'; did you mean 'hashed'?"),
        ({"hashed_layers": 3}, "`model.hashed_layers` is at most `model.num_layers`; got 3 and 2"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


@pytest.mark.parametrize("key_length", [1, 2])
def test_a_token_gate_looks_at_the_token_and_not_across_documents(key_length):
    model = build(token_gate=True, hash_start=20.0, key_length=key_length).eval()
    tokens = torch.tensor([[BEGIN, 3, 4, BEGIN, 3, 4], [BEGIN, 5, 4, 9, 9, 9]])
    keys = model.keys(tokens)
    assert torch.equal(keys[0, :3], keys[0, 3:])
    assert (keys[0, 2] == keys[1, 2]) == (key_length == 1)
    with torch.no_grad():
        logits = model(tokens)
        assert_close(logits[0, :3], logits[0, 3:], rtol=1e-4, atol=1e-5)
    routed = next(iter(moe_layers(model)))[1].routing
    chosen = dense_weights(routed) > 0
    assert torch.equal(chosen[:3], chosen[3:6])


def test_a_token_gate_needs_a_router_of_one_gate():
    with pytest.raises(ValueError, match=r"the one gate of the routers top-k and biased; got .*'noisy-top-k'"):
        replace(SMALL, router="noisy-top-k", token_gate=True)
