"""Hash routing: uniform, independent between seeds and keys, and the same for a key whatever stands beside it."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import Hashed, ModuleExperts, MoE, aux_loss, reference
from tests.cases import dense_weights
from tests.references import reference_gates

NUM_KEYS = 60_000


def experts_of(keys, num_experts=5, top_k=1, seed=0):
    """Chosen experts, (tokens, top_k), in order."""
    keys = keys if keys.dim() == 2 else keys[:, None]
    routing = Hashed(keys.shape[1], num_experts, top_k, seed=seed)(keys)
    return routing.expert_index.view(top_k, len(keys)).t()


def is_uniform(cells, num_cells):
    """Whether every cell is as frequent as the others, within 5 standard errors."""
    share = torch.bincount(cells, minlength=num_cells) / len(cells)
    chance = 1 / num_cells
    return (share - chance).abs().max() < 5 * (chance * (1 - chance) / len(cells)) ** 0.5


def test_it_is_the_references():
    for seed, (num_experts, top_k), dim in product(
        [0, 1, -7, 2**63], [(5, 1), (5, 2), (8, 3), (3, 3), (1, 1)], [1, 2, 3]
    ):
        keys = torch.randint(-(2**62), 2**62, (40, dim))
        keys[:4] = torch.tensor([0, -1, 2**63 - 1, -(2**63)])[:, None]
        routing = Hashed(dim, num_experts, top_k, seed=seed)(keys)
        assert_close(dense_weights(routing), reference.hashed(keys, num_experts, top_k, seed))


def test_the_type_of_a_key_does_not_matter():
    for dtype in [torch.int32, torch.int16, torch.uint8]:
        keys = torch.arange(200)
        assert torch.equal(experts_of(keys.to(dtype)), experts_of(keys))


def test_every_expert_gets_its_share_of_consecutive_keys():
    for num_experts, keys in product([2, 5, 16, 60], [torch.arange(NUM_KEYS), torch.arange(NUM_KEYS) * 2**40]):
        assert is_uniform(experts_of(keys, num_experts).flatten(), num_experts)


def test_another_seed_is_independent():
    for seed in [1, 2, -1, 2**40]:
        keys = torch.arange(NUM_KEYS)
        assert is_uniform(experts_of(keys).flatten() * 5 + experts_of(keys, seed=seed).flatten(), 25)


def test_more_experts_per_token_keep_those_there_were():
    keys = torch.arange(500)
    assert torch.equal(experts_of(keys, 8, 3)[:, :2], experts_of(keys, 8, 2))


def test_one_more_expert_takes_its_share_and_moves_no_other_key():
    before, after = (experts_of(torch.arange(NUM_KEYS), num_experts).flatten() for num_experts in (5, 6))
    moved = before != after
    assert (after[moved] == 5).all()
    assert abs(moved.float().mean() - 1 / 6) < 5 * (5 / 36 / NUM_KEYS) ** 0.5


def test_a_layer_takes_keys_beside_its_items_and_needs_no_loss():
    experts = [torch.nn.Linear(4, 4) for _ in range(3)]
    moe = MoE(Hashed(1, 3), ModuleExperts(experts), item_shape=(4,))
    x, keys = torch.randn(2, 5, 4, requires_grad=True), torch.arange(10).view(2, 5)
    output = moe(x, features=keys)
    chosen = experts_of(keys.flatten(), 3).flatten().tolist()
    expected = torch.stack([experts[expert](item) for expert, item in zip(chosen, x.view(10, 4), strict=True)])
    assert_close(output, expected.view(2, 5, 4))
    assert moe.losses == {}
    assert list(moe.router.parameters()) == []
    (output.sum() + aux_loss(moe)).backward()
    assert x.grad.abs().min() > 0


@pytest.mark.parametrize("score", ["sqrt_softplus", "softmax", "sigmoid"])
def test_a_gate_weighs_what_the_key_chooses(score):
    """Outputs of the specification, and gradients for the gate and for what it looks at."""
    router = Hashed(2, 5, 3, seed=4, gate_dim=6, score=score)
    torch.nn.init.normal_(router.gate.weight)
    keys, seen = torch.randint(-9, 2**24, (20, 2)), torch.randn(20, 6, requires_grad=True)
    features = torch.cat([keys, seen], dim=-1)
    routing = router(features)
    expected = reference_gates(router, features)
    assert_close(dense_weights(routing), expected)
    assert torch.equal(dense_weights(routing) > 0, reference.hashed(keys, 5, 3, 4) > 0)
    parts, probe = (router.gate.weight, seen), torch.randn_like(expected)
    for found, right in zip(
        torch.autograd.grad((dense_weights(routing) * probe).sum(), parts),
        torch.autograd.grad((expected * probe).sum(), parts),
        strict=True,
    ):
        assert_close(found, right, rtol=1e-4, atol=1e-6)


def test_a_gates_scores_of_any_size_have_finite_gradients():
    router = Hashed(1, 4, 2, gate_dim=1)
    torch.nn.init.constant_(router.gate.weight, 1)
    features = torch.tensor([[3.0, value] for value in (-1e4, -200, 0, 200, 1e4)], requires_grad=True)
    weight = router(features).weight
    assert_close(weight, torch.full_like(weight, 0.5))
    weight[0].backward()
    assert features.grad.isfinite().all()


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "message"),
    [({"gate_dim": -1}, "gate_dim is at least 0, where there is no gate; got -1"), ({"score": "max"}, "got 'max'")],
)
def test_a_gate_that_cannot_be(changes, message):
    with pytest.raises(ValueError, match=message):
        Hashed(1, 4, **changes)


@pytest.mark.usefixtures("unchecked")
def test_numbers_that_are_not_integers_are_refused():
    for dtype in [torch.float32, torch.bfloat16]:
        moe = MoE(Hashed(4, 3), ModuleExperts([torch.nn.Linear(4, 4, dtype=dtype) for _ in range(3)]))
        with pytest.raises(
            ValueError, match=rf"by integer keys; pass them as moe\(x, features=keys\). Got .* of {dtype}"
        ):
            moe(torch.randn(2, 4, dtype=dtype))


def test_weights_and_counts_do_not_follow_the_default_type():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        routing = Hashed(1, 1)(torch.arange(2000)[:, None])
    finally:
        torch.set_default_dtype(before)
    assert routing.sums.tokens_per_expert.tolist() == [2000]
    assert routing.weight.dtype == routing.sums.probs.dtype == torch.float32


@pytest.mark.slow
def test_counts_are_exact_beyond_what_float32_holds():
    num_tokens = 2**24 + 5
    sums = Hashed(1, 1)(torch.zeros(num_tokens, 1, dtype=torch.int64)).sums
    assert sums.tokens_per_expert.item() == sums.num_tokens.item() == num_tokens
