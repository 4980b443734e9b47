"""What every router keeps to. A new one in `ROUTERS` is run through all of it."""

import math
import warnings
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import BatchScope
from gatewright.losses import LOSSES
from gatewright.routers import ROUTERS
from gatewright.scope import ONE_PROCESS
from tests.cases import (
    BIASED,
    DROPS,
    EXPERTS_CHOOSE,
    KEYED,
    NUM_EXPERTS,
    ROUTER_CASES,
    UNTAUGHT,
    dense_weights,
    features_for,
    make_router,
)
from tests.references import REFERENCE_GATES

DIM = 6
SIZES = [(5, 2), (4, 1), (3, 3), (1, 1), (9, 4)]  # num_experts, top_k

MODES = (True, False)  # training, evaluation
COUNTS = {"num_tokens", "tokens_per_expert", "dropped", "group_tokens"}

pytestmark = pytest.mark.parametrize("case", ROUTER_CASES)


def route(router, features, scope=ONE_PROCESS, *, training=False):
    torch.manual_seed(1)
    return router.train(training)(features, scope)


class Part(BatchScope):
    """A process's part of a global batch, whose rest is at hand: what a scope over processes computes."""

    def __init__(self, key, whole, start):
        super().__init__(key)
        self.whole, self.start = whole, start

    def token_offset(self, num_tokens):
        return self.start

    def gather(self, values):
        """The part's values among the whole's, which were gathered from a scope that saw all."""
        return torch.cat([self.whole[: self.start], values, self.whole[self.start + len(values) :]])


class Whole(BatchScope):
    """One process that keeps what it is asked to gather."""

    seen = None

    def gather(self, values):
        self.seen = values.detach()
        return values


def test_a_route_does_not_depend_on_how_the_batch_is_split(case):
    """Noise, batch-wise choices and sums are the whole batch's; how many rows there are depends on no value."""
    router = make_router(case, DIM, NUM_EXPERTS, 2)
    features, key = features_for(router, 12), torch.tensor(7)
    for training in MODES:
        whole = Whole(key)
        routing = route(router, features, whole, training=training)
        assert len(routing.weight) == len(route(router, features_for(router, 12), training=training).weight)
        joint = dense_weights(routing)
        parts = {}
        for start, end in ((0, 5), (5, 12), (3, 3)):
            parts[start] = route(router, features[start:end], Part(key, whole.seen, start), training=training)
            assert_close(dense_weights(parts[start]), joint[start:end])
        assert_close((parts[0].sums + parts[5].sums).by_name(), routing.sums.by_name())


def test_whether_it_compares_tokens_in_training_is_declared(case):
    """The routes of the first tokens of a batch, with the same noise, when the others change."""
    router, key = make_router(case, DIM, NUM_EXPERTS, 2), torch.tensor(7)
    features = features_for(router, 24)
    others = torch.cat([features[:12], features_for(router, 24)[12:]])
    first, again = (dense_weights(route(router, x, BatchScope(key.clone()), training=True)) for x in (features, others))
    assert torch.equal(first[:12], again[:12]) is not router.compares_tokens


def check_record(routing, num_tokens, num_experts, most):
    """Indices and weights are in range, and a token goes to an expert once."""
    assert routing.num_experts == num_experts
    assert ((routing.token_index >= 0) & (routing.token_index < max(num_tokens, 1))).all()
    assert ((routing.expert_index >= 0) & (routing.expert_index <= num_experts)).all()
    assert ((routing.weight >= 0) & (routing.weight <= most)).all()
    made = routing.expert_index < num_experts
    assert not routing.weight[~made].any()
    pairs = list(zip(routing.token_index[made].tolist(), routing.expert_index[made].tolist(), strict=True))
    assert len(set(pairs)) == len(pairs)


def check_order(routing, num_tokens, top_k, biased):
    """Where tokens choose, each gets top_k experts, the best first."""
    assert routing.token_index.tolist() == [*range(num_tokens)] * top_k
    assert (routing.expert_index < routing.num_experts).all()
    weight = routing.weight.view(top_k, num_tokens)
    assert (weight[:-1] >= weight[1:]).all() or biased


def check_sums(routing, num_tokens, training):
    chosen = torch.nn.functional.one_hot(routing.expert_index, routing.num_experts + 1)[:, :-1].to(routing.weight.dtype)
    sums = routing.sums
    assert_close(sums.num_tokens, torch.tensor(num_tokens))
    assert_close(sums.tokens_per_expert, chosen.sum(0).long())
    assert_close(sums.importance, routing.weight @ chosen)
    assert_close(sums.probs.sum(), torch.tensor(float(num_tokens)))
    assert ((sums.load >= 0) & (sums.load <= num_tokens + 1e-5)).all()  # an estimate in training
    assert sums.dropped == 0
    assert 0 <= sums.entropy <= num_tokens * torch.tensor(float(routing.num_experts)).log() + 1e-5
    if not training:
        assert_close(sums.load, sums.tokens_per_expert.to(sums.load.dtype))


def test_the_record_is_well_formed_at_every_size(case):
    for (num_experts, top_k), training, num_tokens in product(SIZES, MODES, (0, 1, 17)):
        router = make_router(case, DIM, num_experts, top_k)
        discards = type(router) in DROPS and training  # its sums are of what was chosen, before some are discarded
        routing = route(router, features_for(router, num_tokens), training=training)
        check_record(routing, num_tokens, num_experts, most=math.inf if discards else 1)
        if not discards and type(router) not in EXPERTS_CHOOSE:
            check_order(routing, num_tokens, top_k, biased=type(router) in BIASED)
        if not discards:
            check_sums(routing, num_tokens, training)


def test_evaluation_draws_nothing(case):
    router = make_router(case, DIM, NUM_EXPERTS, 2).eval()
    features, before = features_for(router, 9), torch.get_rng_state()
    assert torch.equal(dense_weights(router(features)), dense_weights(router(features)))
    assert torch.equal(torch.get_rng_state(), before)


def test_routing_is_at_least_float32(case):
    wide, narrow = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
    for module, given in [*product(wide, wide), *((dtype, dtype) for dtype in narrow), (torch.float32, narrow[0])]:
        router = make_router(case, DIM, NUM_EXPERTS, 2).to(module)
        features = features_for(router, 7)
        features = features.to(given) if features.is_floating_point() else features
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                routing = route(router, features, training=True)
            weight = torch.float64 if torch.float64 in (module, given) else torch.float32
            types = {name: value.dtype for name, value in routing.sums.by_name().items()}
            wanted = {name: torch.int64 if name in COUNTS else weight for name in types}
            if type(router) not in KEYED:  # routed by integers, with weights of one type
                assert {"weight": routing.weight.dtype, **types} == {"weight": weight, **wanted}


def test_the_task_teaches_the_gate_or_a_warning_says_that_it_does_not(case):
    for top_k in (1, 2, 3):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ROUTER_CASES[case](DIM, 5, top_k)
        assert all("no gradient from the task" in str(warning.message) for warning in caught)
        router = make_router(case, DIM, 5, top_k)
        taught = [p for name, p in router.named_parameters() if name not in UNTAUGHT.get(type(router), ())]
        weight = route(router, features_for(router, 9), training=True).weight
        if taught:
            weight.mul(torch.randn_like(weight)).sum().backward()
        assert all(parameter.grad.abs().max() > 1e-4 for parameter in taught) is not bool(caught), top_k


def test_extreme_logits_stay_finite(case):
    """Where scores vanish, and a sigmoid of every expert is 0."""
    router = make_router(case, 1, 4, 2)
    for parameter in router.parameters():
        with torch.no_grad():
            parameter.copy_(torch.linspace(1, 0.1, parameter.numel()).view_as(parameter))
    features = torch.tensor([[1e4], [-1e4], [0.0], [1e3]])
    for training in MODES:
        routing = route(router, features.long() if type(router) in KEYED else features, training=training)
        assert routing.weight.isfinite().all()
        if routing.weight.requires_grad:
            (routing.weight.sum() + routing.sums.probs.sum()).backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


def test_every_parameter_has_a_dimension_and_a_part_in_the_output(case):
    """FSDP2 shards by the first dimension; DDP takes what the output does not depend on for unused."""
    router = make_router(case, DIM, 5, 2)
    weight = route(router, features_for(router, 9), training=True).weight
    if weight.requires_grad:
        weight.sum().backward()
    assert [name for name, p in router.named_parameters() if p.grad is None or p.dim() == 0] == []


def test_one_expert_needs_no_warning(case, recwarn):
    ROUTER_CASES[case](DIM, 1, 1)
    assert not recwarn


def test_impossible_sizes_are_refused(case):
    with pytest.raises(ValueError, match=r"top_k \(4\) cannot exceed num_experts \(3\)"):
        ROUTER_CASES[case](6, 3, 4)
    for sizes in ((0, 3, 1), (6, 0, 1), (6, 3, 0)):
        with pytest.raises(ValueError, match="at least 1; got {}, {} and {}".format(*sizes)):
            ROUTER_CASES[case](*sizes)


def test_default_losses_exist_and_teach_the_router(case):
    router = make_router(case, DIM, NUM_EXPERTS, 2)
    losses = {**LOSSES, **router.own_losses}
    sums = route(router, features_for(router, 9), training=True).sums
    for name, coefficient in router.default_losses.items():
        gradients = torch.autograd.grad(
            losses[name](sums), list(router.parameters()), retain_graph=True, allow_unused=True
        )
        assert coefficient > 0
        assert any(gradient is not None and gradient.any() for gradient in gradients)


def test_it_is_known_by_its_names(case):
    """It has a reference, its registered name is its class in words, and it prints its sizes."""
    router = make_router(case, DIM, NUM_EXPERTS, 2)
    assert type(router) in REFERENCE_GATES
    assert f"dim=6, num_experts={NUM_EXPERTS}, top_k=2" in repr(router)
    if case in ROUTERS:
        words = "".join(f"-{letter.lower()}" if letter.isupper() else letter for letter in ROUTERS[case].__name__)
        assert words.lstrip("-") == case
