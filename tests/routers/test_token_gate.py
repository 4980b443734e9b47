"""A gate that knows the token itself: as a linear gate of a one-hot vector would, and as hash routing at first."""

import torch
from torch.testing import assert_close

from gatewright import Biased, Hashed, ModuleExperts, MoE, TokenGate, TopK, aux_loss
from tests.cases import dense_weights

NUM_TOKENS = 50


def features_of(tokens, dim=6):
    x = torch.randn(len(tokens), dim)
    return x, torch.cat([tokens[:, None], x], dim=-1)


def test_it_is_a_linear_gate_of_the_token_as_a_one_hot_vector():
    gate = TokenGate(6, 4, NUM_TOKENS)
    torch.nn.init.normal_(gate.table)
    tokens = torch.randint(NUM_TOKENS, (30,))
    x, features = features_of(tokens)
    one_hot = torch.nn.functional.one_hot(tokens, NUM_TOKENS).float()
    whole = torch.cat([gate.gate.weight, gate.table.T], dim=1)
    logits = gate(features)
    assert_close(logits, torch.cat([x, one_hot], dim=1) @ whole.T)
    logits.square().sum().backward()
    assert_close(gate.table.grad, one_hot.T @ (2 * logits.detach()))


def test_it_begins_with_the_choice_of_hash_routing_and_learns_another():
    router = TopK(7, 8, top_k=2, score_after_top_k=True)
    router.gate = TokenGate(6, 8, NUM_TOKENS, top_k=2, hash_start=4.0)
    tokens = torch.arange(NUM_TOKENS)
    _, features = features_of(tokens)
    hashed = Hashed(1, 8, top_k=2)(tokens[:, None])

    assert torch.equal(dense_weights(router(features)) > 0, dense_weights(hashed) > 0)
    optimizer = torch.optim.SGD([router.gate.table], lr=5.0)
    for _ in range(20):
        (-router(features).logits[:, 0]).sum().backward()
        optimizer.step()
    assert (dense_weights(router(features))[:, 0] > 0).all()


def test_a_layer_trains_it_and_resets_it_on_meta():
    for make in (TopK, Biased):
        router = make(7, 4, top_k=2)
        router.gate = TokenGate(6, 4, NUM_TOKENS, top_k=2, hash_start=1.0)
        layer = MoE(router, ModuleExperts(lambda: torch.nn.Linear(6, 6), 4), item_shape=6)
        x, features = features_of(torch.randint(NUM_TOKENS, (20,)))
        (layer(x, features=features).sum() + aux_loss(layer)).backward()
        assert router.gate.table.grad.abs().sum() > 0
    with torch.device("meta"):
        gate = TokenGate(6, 4, NUM_TOKENS, top_k=2, hash_start=1.0)
    gate.to_empty(device="cpu").reset_parameters()
    assert gate.table.sum() == 2 * NUM_TOKENS
