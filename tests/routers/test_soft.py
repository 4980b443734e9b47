"""Soft routing: its weights, its groups, and the rows that they make of tokens."""

import pytest
import torch
from torch.testing import assert_close

from gatewright import Soft
from gatewright.losses import router_z_loss
from gatewright.routers.soft import SlotWeights
from gatewright.scope import ONE_PROCESS
from tests.cases import SOFT_CASES, dense_weights, make_router

cases = pytest.mark.parametrize("case", SOFT_CASES)


def soft(case, num_experts=5):
    return make_router(case, 8, num_experts, None)


@cases
@pytest.mark.parametrize("num_tokens", [0, 3, 12])
def test_weights_sum_to_one_and_the_record_agrees_with_them(case, num_tokens):
    weights = soft(case)(torch.randn(num_tokens, 8))
    groups, group_tokens, experts, slots = weights.dispatch.shape
    assert (groups * group_tokens, experts) == (num_tokens, 5)
    if num_tokens:
        assert_close(weights.dispatch.sum(1), torch.ones(groups, experts, slots))
    assert_close(weights.combine.sum((2, 3)), torch.ones(groups, group_tokens))
    routing = weights.routing
    by_expert = weights.combine.sum(3).flatten(0, 1)
    assert_close(dense_weights(routing), by_expert)
    assert_close(routing.probs, routing.logits.softmax(-1))
    for per_expert in (routing.sums.tokens_per_expert, routing.sums.importance, routing.sums.load, routing.sums.probs):
        assert_close(per_expert, by_expert.sum(0))
    assert_close(routing.sums.entropy, -(by_expert * by_expert.log()).sum())
    assert (routing.sums.num_tokens, routing.sums.dropped) == (num_tokens, 0)


def test_logits_are_cosines_times_the_scale():
    """Two slots at right angles, and tokens along the first, between them, and of no direction at all."""
    router = Soft(2, 2)
    with torch.no_grad():
        router.gate.weight.copy_(torch.tensor([[5.0, 0.0], [0.0, 0.1]]))
        router.scale.fill_(2.0)
    logits = torch.tensor([[2.0, 0.0], [2**0.5, 2**0.5], [0.0, 0.0]])
    weights = router(torch.tensor([[3.0, 0.0], [7.0, 7.0], [0.0, 0.0]]))
    assert_close(weights.combine[0, :, :, 0], logits.softmax(1), rtol=1e-5, atol=1e-5)
    assert_close(weights.dispatch[0, :, :, 0], logits.softmax(0), rtol=1e-5, atol=1e-5)
    assert_close(router_z_loss(weights.routing.sums), logits.logsumexp(1).square().mean(), rtol=1e-5, atol=1e-5)


def test_rows_and_outputs_by_hand():
    """Two groups of two tokens, two experts of one slot: the rows of the first expert come first."""
    dispatch = torch.tensor([[[0.5, 1.0], [0.5, 0.0]], [[0.25, 0.0], [0.75, 1.0]]])[..., None]
    combine = torch.tensor([[[1.0, 0.0], [0.5, 0.5]], [[0.0, 1.0], [0.25, 0.75]]])[..., None]
    weights = SlotWeights(dispatch, combine, ONE_PROCESS, Soft(1, 2)(torch.zeros(4, 1)).routing)
    assert weights.fill(torch.tensor([[10.0], [20.0], [40.0], [80.0]])).flatten().tolist() == [15, 70, 10, 80]
    assert weights.of_slots().expert_index.tolist() == [0, 0, 1, 1]
    assert weights.spread(torch.tensor([[1.0], [2.0], [3.0], [4.0]])).flatten().tolist() == [1, 2, 4, 3.5]


@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rows_are_weighted_and_added_in_at_least_float32(dtype, autocast):
    """Sixty times 1 / 64 and a bit that a weight of the rows' type would lose, and that shows in the sum."""
    weight = torch.full((1, 60, 1, 1), (1 + 0.45 * torch.finfo(dtype).eps) / 64)
    record = Soft(1, 1)(torch.zeros(60, 1)).routing
    gather, spread = (SlotWeights(each, each, ONE_PROCESS, record) for each in (weight, weight.view(1, 1, 60, 1)))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = gather.fill(torch.ones(60, 3, dtype=dtype)), spread.spread(torch.ones(60, 3, dtype=dtype))
    for values in found:
        assert values.dtype == dtype
        assert_close(values, weight.double().sum().to(dtype).expand(1, 3), rtol=0, atol=1e-12)


@cases
@pytest.mark.parametrize(
    ("module", "features", "weight"),
    [
        (torch.float64, torch.float64, torch.float64),
        (torch.float32, torch.float64, torch.float64),
        (torch.bfloat16, torch.bfloat16, torch.float32),
        (torch.float32, torch.float16, torch.float32),
    ],
)
@pytest.mark.parametrize("autocast", [False, True], ids=["plain", "autocast"])
def test_routing_is_at_least_float32(case, module, features, weight, autocast):
    router = soft(case).to(module)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        weights = router(torch.randn(9, 8, dtype=features))
    sums = weights.routing.sums
    assert {t.dtype for t in (weights.dispatch, weights.combine, sums.load, sums.router_z)} == {weight}


def test_a_state_from_when_the_scale_was_a_number_is_taken():
    model = torch.nn.Sequential(Soft(2, 3))
    state = {**model.state_dict(), "0.scale": torch.tensor(5.0)}
    model.load_state_dict(state)
    assert model[0].scale.tolist() == [5.0]
    assert state["0.scale"].shape == ()


@pytest.mark.parametrize("group_size", [None, 1, 2])
@pytest.mark.parametrize("scale", [1e4, -1e4, 0.0])
def test_extreme_logits_and_tokens_without_a_direction_stay_finite(group_size, scale):
    router = Soft(4, 3, group_size=group_size)
    torch.nn.init.constant_(router.scale, scale)
    features = torch.cat([torch.randn(3, 4), torch.zeros(1, 4)]).requires_grad_()
    weights = router(features)
    (weights.dispatch.square().sum() + weights.combine.square().sum()).backward()
    assert_close(weights.dispatch.sum(1), torch.ones_like(weights.dispatch.sum(1)), rtol=0, atol=2e-3)
    for gradient in (features.grad, router.gate.weight.grad, router.scale.grad):
        assert gradient.isfinite().all()


@pytest.mark.parametrize(("num_tokens", "group_size"), [(10, 4), (1, 2)])
def test_tokens_come_in_whole_groups(num_tokens, group_size):
    message = rf"multiple of group_size \({group_size}\); got {num_tokens}. Pass whole groups"
    with pytest.raises(ValueError, match=message):
        Soft(4, 3, group_size=group_size)(torch.randn(num_tokens, 4))


@pytest.mark.parametrize(
    ("sizes", "options"), [((0, 3), {}), ((4, 0), {}), ((4, 3), {"slots_per_expert": 0}), ((4, 3), {"group_size": 0})]
)
def test_impossible_sizes_are_refused(sizes, options):
    with pytest.raises(ValueError, match=r"Sizes are at least 1; got .*=0"):
        Soft(*sizes, **options)
