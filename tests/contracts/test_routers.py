"""What every router keeps to. A new one in `ROUTERS` is run through all of it."""

import copy
import warnings
from dataclasses import fields

import pytest
import torch
from torch.testing import assert_close

from gatewright.losses import LOSSES
from gatewright.routers import ROUTERS
from tests.cases import REFERENCE_GATES, ROUTER_CASES, make_router

DIM = 6
SIZES = [(5, 2), (4, 1), (3, 3), (1, 1)]  # num_experts, top_k

pytestmark = pytest.mark.parametrize("case", ROUTER_CASES)
sizes = pytest.mark.parametrize(("num_experts", "top_k"), SIZES)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
tokens = pytest.mark.parametrize("num_tokens", [0, 1, 17])


def route(router, features, *, training=False):
    torch.manual_seed(1)
    return router.train(training)(features)


@sizes
@modes
@tokens
def test_the_record_is_well_formed(case, num_experts, top_k, training, num_tokens):
    router = make_router(case, DIM, num_experts, top_k)
    routing = route(router, torch.randn(num_tokens, DIM), training=training)
    assert routing.num_experts == num_experts
    assert routing.token_index.tolist() == [*range(num_tokens)] * top_k  # length and order, whatever the values
    expert_index, weight = routing.expert_index.view(top_k, num_tokens), routing.weight.view(top_k, num_tokens)
    assert ((expert_index >= 0) & (expert_index < num_experts)).all()
    assert all(len(set(chosen)) == top_k for chosen in expert_index.t().tolist())  # an expert is chosen once
    assert ((weight >= 0) & (weight <= 1)).all()
    assert (weight[:-1] >= weight[1:]).all()  # first choices weigh most


@sizes
@modes
@tokens
def test_the_sums_agree_with_the_assignments(case, num_experts, top_k, training, num_tokens):
    routing = route(make_router(case, DIM, num_experts, top_k), torch.randn(num_tokens, DIM), training=training)
    chosen = torch.nn.functional.one_hot(routing.expert_index, num_experts).to(routing.weight.dtype)
    sums = routing.sums
    assert_close(sums.num_tokens, torch.tensor(float(num_tokens)))
    assert_close(sums.tokens_per_expert, chosen.sum(0))
    assert_close(sums.importance, routing.weight @ chosen)
    assert_close(sums.probs.sum(), torch.tensor(float(num_tokens)))
    assert ((sums.load >= 0) & (sums.load <= num_tokens + 1e-5)).all()  # an estimate in training
    assert sums.dropped == 0
    assert 0 <= sums.entropy <= num_tokens * torch.tensor(float(num_experts)).log() + 1e-5
    if not training:
        assert_close(sums.load, sums.tokens_per_expert)


def test_sums_of_two_batches_are_the_sums_of_the_joint_batch(case):
    router, features = make_router(case, DIM, 5, 2), torch.randn(12, DIM)
    joint, parts = route(router, features).sums, route(router, features[:5]).sums + route(router, features[5:]).sums
    for field in fields(joint):
        assert_close(getattr(parts, field.name), getattr(joint, field.name))


def test_evaluation_looks_at_one_token_at_a_time(case):
    router, features = make_router(case, DIM, 5, 2), torch.randn(9, DIM)
    order = torch.randperm(9)
    joint, shuffled = route(router, features), route(router, features[order])
    alone = [route(router, features[token : token + 1]) for token in range(9)]
    for name in ("expert_index", "weight"):
        values = getattr(joint, name).view(2, 9)
        assert_close(getattr(shuffled, name).view(2, 9), values[:, order], rtol=0, atol=1e-6)
        assert_close(torch.stack([getattr(routing, name) for routing in alone], 1), values, rtol=0, atol=1e-6)


def test_evaluation_draws_nothing(case):
    router, features = make_router(case, DIM, 5, 2).eval(), torch.randn(9, DIM)
    before = torch.get_rng_state()
    first, second = router(features), router(features)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.expert_index, second.expert_index)
    assert torch.equal(first.weight, second.weight)


@pytest.mark.parametrize(
    ("module", "features", "weight"),
    [
        (torch.float32, torch.float32, torch.float32),
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float16, torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_routing_is_at_least_float32(case, module, features, weight, autocast):
    router = make_router(case, DIM, 5, 2).to(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        routing = route(router, torch.randn(7, DIM, dtype=features), training=True)
    assert routing.weight.dtype == weight
    assert {getattr(routing.sums, field.name).dtype for field in fields(routing.sums)} == {weight}


def test_autocast_changes_nothing(case):
    router, features = make_router(case, DIM, 5, 2), torch.randn(7, DIM)
    plain = route(router, features, training=True)
    with torch.autocast("cpu", torch.bfloat16):
        cast = route(router, features, training=True)
    assert torch.equal(cast.expert_index, plain.expert_index)
    assert torch.equal(cast.weight, plain.weight)


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_the_task_teaches_the_gate_or_a_warning_says_that_it_does_not(case, top_k):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ROUTER_CASES[case](DIM, 5, top_k)
    assert all("no gradient from the task" in str(warning.message) for warning in caught)
    router = make_router(case, DIM, 5, top_k)
    weight = route(router, torch.randn(9, DIM), training=True).weight
    weight.mul(torch.randn_like(weight)).sum().backward()
    taught = all(parameter.grad.abs().max() > 1e-4 for parameter in router.parameters())
    assert taught is not bool(caught)


def test_one_expert_needs_no_warning(case, recwarn):
    ROUTER_CASES[case](DIM, 1, 1)
    assert not recwarn


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((6, 3, 4), r"top_k \(4\) cannot exceed num_experts \(3\)"),
        ((0, 3, 1), "at least 1; got 0, 3 and 1"),
        ((6, 0, 1), "at least 1; got 6, 0 and 1"),
        ((6, 3, 0), "at least 1; got 6, 3 and 0"),
    ],
)
def test_impossible_sizes_are_refused(case, sizes, message):
    with pytest.raises(ValueError, match=message):
        ROUTER_CASES[case](*sizes)


@modes
def test_copies_and_loaded_state_route_alike(case, training):
    router, features = make_router(case, DIM, 5, 2), torch.randn(9, DIM)
    loaded = make_router(case, DIM, 5, 2)
    loaded.load_state_dict(router.state_dict())
    expected = route(router, features, training=training)
    for other in (copy.deepcopy(router), loaded):
        routing = route(other, features, training=training)
        assert torch.equal(routing.expert_index, expected.expert_index)
        assert torch.equal(routing.weight, expected.weight)


@modes
def test_inference_mode(case, training):
    router, features = make_router(case, DIM, 5, 2), torch.randn(9, DIM)
    with torch.inference_mode():
        routing = route(router, features, training=training)
    assert torch.equal(routing.weight, route(router, features, training=training).weight)


def test_default_losses_exist_and_depend_on_the_gate(case):
    router = make_router(case, DIM, 5, 2)
    assert set(router.default_losses) <= set(LOSSES)
    sums = route(router, torch.randn(9, DIM), training=True).sums
    for name, coefficient in router.default_losses.items():
        (gradient,) = torch.autograd.grad(LOSSES[name](sums), router.gate.weight, retain_graph=True)
        assert coefficient > 0
        assert gradient.abs().max() > 0


def test_it_has_a_reference(case):
    assert type(make_router(case, DIM, 3, 2)) in REFERENCE_GATES


def test_its_registered_name_is_its_class_in_words(case):
    if case in ROUTERS:
        words = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in ROUTERS[case].__name__)
        assert words.lstrip("-") == case


def test_it_prints_its_sizes(case):
    assert "dim=6, num_experts=5, top_k=2" in repr(make_router(case, DIM, 5, 2))
