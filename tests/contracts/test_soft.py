"""What every dense router keeps to, and a layer that is made of it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import BatchScope
from gatewright.dispatch import SoftDispatch
from gatewright.routers import ROUTERS
from gatewright.scope import ONE_PROCESS
from tests.cases import SOFT_CASES, make_soft_moe

pytestmark = pytest.mark.parametrize("case", SOFT_CASES)


def make_router(case):
    return make_soft_moe(case).router


def test_every_parameter_has_a_dimension_and_a_part_in_the_output(case):
    """FSDP2 shards by the first dimension; DDP takes what the output does not depend on for unused."""
    router = make_router(case)
    router(torch.randn(12, 8)).combine.square().sum().backward()
    assert [name for name, p in router.named_parameters() if p.grad is None or p.dim() == 0] == []


def test_the_record_is_well_formed_and_its_sums_agree_with_the_weights(case):
    for num_tokens in (0, 3, 12):  # whole groups of 3
        routing = make_router(case)(torch.randn(num_tokens, 8))
        assert routing.dispatch.shape == routing.combine.shape
        groups, group_tokens, num_experts, slots = routing.dispatch.shape
        assert (groups * group_tokens, num_experts) == (num_tokens, routing.num_experts)
        if num_tokens:
            assert_close(routing.dispatch.sum(1), torch.ones(groups, num_experts, slots))
        assert_close(routing.combine.sum((2, 3)), torch.ones(groups, group_tokens))
        assert_close(routing.weight.sum(1), torch.ones(num_tokens))
        assert (routing.dispatch > 0).all()
        assert (routing.combine > 0).all()
        sums = routing.sums
        assert sums.num_tokens == num_tokens
        for per_expert in (sums.tokens_per_expert, sums.importance, sums.load, sums.probs):
            assert_close(per_expert, routing.combine.sum((0, 1, 3)))
        assert_close(sums.entropy, -(routing.weight * routing.weight.log()).sum())
        assert (sums.dropped, sums.threshold) == (0, 0)
        assert (len(sums.group_load), len(sums.group_tokens)) == (0, 0)


def test_sums_of_two_batches_are_the_sums_of_the_joint_batch(case):
    """What counts is where tokens get their outputs from, which is the tokens' own affair."""
    router, features = make_router(case), torch.randn(12, 8)
    joint, parts = router(features).sums, router(features[:3]).sums + router(features[3:]).sums
    for field in fields(joint):
        assert_close(getattr(parts, field.name), getattr(joint, field.name))


class Process(BatchScope):
    """One of several threads that have a batch between them, in place of processes."""

    def __init__(self, place, shared, barrier):
        super().__init__()
        self.place, self.shared, self.barrier = place, shared, barrier

    def gather(self, values):
        self.shared[self.place] = values
        self.barrier.wait()
        gathered = torch.cat(self.shared)
        self.barrier.wait()
        return gathered

    def sum(self, *values):
        return tuple(self.gather(value[None]).sum(0) for value in values)


@pytest.mark.parametrize("sizes", [(3, 9), (6, 0, 6)])
def test_rows_and_outputs_do_not_depend_on_how_the_batch_is_split(case, sizes):
    """Each process has its part of the dispatch weights; those that share a group fill its slots together."""
    router, dispatcher = make_router(case), SoftDispatch()
    features, upstream = torch.randn(12, 8), torch.randn(12, 8)
    shared, barrier = [None] * len(sizes), threading.Barrier(len(sizes), timeout=60)

    def dispatch(place, part):
        return dispatcher.dispatch(part, router(part, Process(place, shared, barrier)), training=True)

    def run(batches):
        parts = zip(batches, sizes, strict=True)
        output = torch.cat([dispatcher.combine(batch.rows.sin(), batch, size) for batch, size in parts])
        return output, torch.autograd.grad((output * upstream).sum(), list(router.parameters()))

    with ThreadPoolExecutor(len(sizes)) as pool:
        actual = run(list(pool.map(dispatch, range(len(sizes)), features.split(sizes))))
    whole = dispatcher.dispatch(features, router(features), training=True)
    expected = dispatcher.combine(whole.rows.sin(), whole, 12)
    assert_close(actual[0], expected)
    gradients = torch.autograd.grad((expected * upstream).sum(), list(router.parameters()))
    for found, gradient in zip(actual[1], gradients, strict=True):
        assert_close(found, gradient, rtol=1e-4, atol=1e-6)


def test_routing_is_at_least_float32(case):
    wide, narrow = (torch.float32, torch.float64), (torch.bfloat16, torch.float16)
    counts = ("num_tokens", "dropped", "group_tokens")
    for module, given in [*product(wide, wide), *((dtype, dtype) for dtype in narrow), (torch.float32, narrow[0])]:
        router, weight = make_router(case).to(module), torch.promote_types(torch.promote_types(module, given), wide[0])
        for autocast in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                routing = router(torch.randn(9, 8, dtype=given))
            assert (routing.dispatch.dtype, routing.combine.dtype) == (weight, weight)
            types = {field.name: getattr(routing.sums, field.name).dtype for field in fields(routing.sums)}
            assert types == {name: torch.int64 if name in counts else weight for name in types}


def test_nothing_is_drawn_and_training_is_evaluation(case):
    router, features = make_router(case), torch.randn(9, 8)
    before = torch.get_rng_state()
    with torch.autocast("cpu", torch.bfloat16):
        trained = router.train()(features)
    evaluated = router.eval()(features, ONE_PROCESS)
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(trained.dispatch, evaluated.dispatch)
    assert torch.equal(trained.combine, evaluated.combine)


def test_the_task_teaches_the_router(case):
    router = make_router(case)
    routing = router(torch.randn(9, 8))
    routing.combine.mul(torch.randn_like(routing.combine)).sum().backward()
    assert all(parameter.grad.abs().max() > 1e-4 for parameter in router.parameters())


def test_detach_leaves_values_and_no_graph(case):
    routing = make_router(case)(torch.randn(9, 8))
    bare = routing.detach()
    assert torch.equal(bare.dispatch, routing.dispatch)
    assert torch.equal(bare.combine, routing.combine)
    assert not any(tensor.requires_grad for tensor in (bare.dispatch, bare.combine, bare.weight, bare.sums.load))


def test_evaluation_does_not_depend_on_other_groups(case):
    """The same group alone, among others and in another order; where all are one group, on all."""
    for experts in ("grouped-swiglu-bias", "modules"):
        moe, x = make_soft_moe(case, experts).eval(), torch.randn(12, 8)
        with torch.no_grad():
            joint, alone = moe(x), moe(x[3:6])
            assert_close(moe(x.view(4, 3, 8).flip(0).view(12, 8)).view(4, 3, 8).flip(0).view(12, 8), joint)
        independent = moe.router.group_size is not None
        assert torch.allclose(alone, joint[3:6], rtol=0, atol=1e-6) is independent
        assert (alone - joint[3:6]).abs().max() > 1e-3 or independent


def test_its_name_leads_to_it(case):
    assert ROUTERS["soft"] is type(make_router(case))
