"""The expert bias: what moves it, when, and what it survives."""

import warnings
from itertools import product

import pytest
import torch
from torch.testing import assert_close

from gatewright import BatchScope, Biased, GroupedFeedForward, MoE, end_step, reference
from gatewright.routers.expert_bias import FORGOTTEN_STEPS, ExpertBias
from gatewright.routing import top_k_routing

FORGOTTEN = r"1000 training forwards were routed by an expert bias that never moved.* Call gatewright.end_step\(model\)"


def sums_of(load):
    """The sums of a forward that sent so many tokens to each expert."""
    expert_index = torch.arange(len(load)).repeat_interleave(torch.tensor(load))[:, None]
    logits = torch.zeros(len(expert_index), len(load))
    return top_k_routing(expert_index, torch.ones(expert_index.shape), logits, logits.softmax(-1)).sums


def step(bias, *loads):
    for load in loads:
        bias.record(sums_of(load))
    bias.end_step(BatchScope())
    return bias.bias.clone()


def test_a_step_is_the_references():
    for load, rate in product([[5, 0, 1], [0, 0, 0, 7], [2, 2], [1, 2, 3], [4], [3, 3, 0, 9, 0]], [0.001, 0.5]):
        bias = ExpertBias(len(load), rate)
        first = torch.randn(len(load))
        bias.bias.copy_(first)
        assert torch.equal(step(bias, load), reference.moved_bias(first, torch.tensor(load).float(), rate))


def test_the_load_of_all_micro_batches_makes_one_step():
    """Either batch alone would move the first expert up; together they move it down."""
    bias = ExpertBias(3, 0.1)
    assert_close(step(bias, [3, 9, 0], [3, 0, 0], [3, 0, 0]), torch.tensor([-0.1, -0.1, 0.1]))
    assert not bias.load.any()
    assert_close(step(bias, [0, 0, 3]), torch.tensor([0.0, 0.0, 0.0]), rtol=0, atol=1e-8)  # nothing of before counts


def test_without_a_load_or_with_an_even_one_nothing_changes():
    bias = ExpertBias(3, 0.1)
    before = step(bias, [1, 2, 3])
    assert before.any()
    assert torch.equal(step(bias), before)
    assert torch.equal(step(bias, [0, 0, 0]), before)
    assert torch.equal(step(bias, [4, 4, 4]), before)


def biased_moe(**options):
    return MoE(Biased(8, 5, 2, **options), GroupedFeedForward(5, 8, 8))


TYPES = [torch.bfloat16, torch.float16, torch.float64]


def test_the_bias_stays_float32_bit_by_bit_in_a_model_of_another_type():
    for dtype in TYPES:
        router = Biased(8, 5, 2)
        router.expert_bias.bias.copy_(torch.randn(5))
        router.expert_bias.load.copy_(torch.tensor([1, 257, 65521, 3, 2**40]))
        before = {name: buffer.clone() for name, buffer in router.named_buffers()}
        router.to(dtype)
        assert router.gate.weight.dtype == dtype
        assert sorted(before) == ["expert_bias.bias", "expert_bias.load"]
        for name, buffer in router.named_buffers():
            assert buffer.dtype == before[name].dtype
            assert torch.equal(buffer, before[name])
        assert router.float().gate.weight.dtype == torch.float32
        assert [len(list(router.expert_bias.buffers())), *router.state_dict()] == [2, "gate.weight", "expert_bias.bias"]


def test_small_steps_add_up_in_a_model_of_any_type():
    """In bfloat16 the neighbours of 0.5 are 0.002 and 0.004 away: 100 steps of 0.001 would lead nowhere."""
    for dtype in [*TYPES, torch.float32]:
        moe = biased_moe().to(dtype)
        bias = moe.router.expert_bias
        bias.bias.fill_(0.5)
        for _ in range(100):
            bias.record(sums_of([9, 0, 0, 0, 1]))
            end_step(moe)
        assert_close(bias.bias, torch.tensor([0.4, 0.6, 0.6, 0.6, 0.6]), rtol=0, atol=1e-5)
        moe(torch.randn(13, 8, dtype=dtype))
        assert bias.load.sum() == 26


def test_a_model_made_on_the_meta_device_takes_its_bias_from_a_state():
    source = Biased(8, 5, 2)
    source.expert_bias.bias.copy_(torch.randn(5))
    with torch.device("meta"):
        router = Biased(8, 5, 2)
    router.bfloat16().to_empty(device="cpu").load_state_dict(source.state_dict())
    assert torch.equal(router.expert_bias.bias, source.expert_bias.bias)
    assert router.expert_bias.load.tolist() == [0] * 5
    assert router.gate.weight.dtype == torch.bfloat16
    assert router.to("meta").expert_bias.bias.is_meta


def test_the_default_type_does_not_matter():
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert [buffer.dtype for buffer in ExpertBias(3).buffers()] == [torch.float32, torch.int64]
    finally:
        torch.set_default_dtype(torch.float32)


def test_a_state_holds_the_bias_and_not_the_load():
    bias = ExpertBias(3, 0.1)
    moved = step(bias, [1, 2, 6])
    bias.record(sums_of([0, 0, 5]))
    assert list(bias.state_dict()) == ["bias"]
    twin = ExpertBias(3, 0.1)
    twin.load_state_dict(bias.state_dict())
    assert torch.equal(twin.bias, moved)
    assert torch.equal(step(twin), moved)  # no load came with it


def test_a_rate_of_0_keeps_the_bias_and_notes_nothing():
    bias = ExpertBias(3, 0.1)
    before = step(bias, [1, 2, 6])
    bias.rate = 0.0
    bias.record(sums_of([1, 2, 6]))
    assert not bias.load.any()
    assert torch.equal(step(bias), before)


def forwards(bias, count):
    sums = sums_of([1, 2, 6])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(count):
            bias.record(sums)
    return [str(warning.message) for warning in caught]


def test_forgotten_steps_are_warned_of_once():
    bias = ExpertBias(3)
    assert FORGOTTEN_STEPS == 1000
    assert forwards(bias, 999) == []
    with pytest.warns(UserWarning, match=FORGOTTEN):
        bias.record(sums_of([1, 2, 6]))
    assert forwards(bias, 2500) == []


def test_where_steps_are_made_nobody_is_warned():
    bias = ExpertBias(3)
    assert forwards(bias, 999) == []
    bias.end_step(BatchScope())
    assert forwards(bias, 2500) == []  # an accumulation this long is the user's business


def test_a_bias_that_is_not_to_move_needs_no_steps():
    for bias in [ExpertBias(3, 0.0), ExpertBias(3).eval()]:
        assert forwards(bias, 1001) == []


def test_a_wrong_rate_is_refused():
    for rate in [-0.1, float("inf"), float("nan")]:
        with pytest.raises(ValueError, match=f"bias_rate is finite and at least 0; got {rate}"):
            Biased(8, 5, 2, bias_rate=rate)
