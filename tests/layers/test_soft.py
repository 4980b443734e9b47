"""A layer of soft routing: groups, types, copies and checkpoints."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import GroupedFeedForward, ModuleExperts, Soft, SoftMoE, aux_loss
from tests.cases import SOFT_CASES, make_soft_moe

pytestmark = pytest.mark.parametrize("case", SOFT_CASES)
kinds = pytest.mark.parametrize("experts", ["grouped-swiglu-bias", "modules", "modules-different"])


@kinds
def test_an_output_depends_on_its_group_alone(case, experts):
    """The same group alone, among others and in another order; where all are one group, on all."""
    moe, x = make_soft_moe(case, experts).eval(), torch.randn(4, 3, 8)
    with torch.no_grad():
        joint = moe(x)
        assert_close(moe(x.flip(0)).flip(0), joint, rtol=0, atol=1e-6)
        alone = moe(x[1])
        assert torch.equal(moe.train()(x), joint)
    independent = moe.router.group_size is not None
    assert ((alone - joint[1]).abs().max() <= 1e-6) == independent
    assert (alone - joint[1]).abs().max() > 1e-3 or independent


@kinds
@pytest.mark.parametrize("num_tokens", [0, 3, 12])
def test_a_training_step_gives_every_parameter_a_gradient(case, experts, num_tokens):
    moe, x = make_soft_moe(case, experts), torch.randn(num_tokens, 8, requires_grad=True)
    output = moe(x)
    assert aux_loss(moe) == 0
    output.sum().backward()
    assert output.shape == (num_tokens, 8)
    assert x.grad.isfinite().all()
    assert all(p.dim() and p.grad.isfinite().all() and (p.grad.any() or not num_tokens) for p in moe.parameters())


def test_items_and_outputs_have_any_shape(case):
    router = SOFT_CASES[case](4, 2)
    moe = SoftMoE(router, ModuleExperts(lambda: nn.Flatten(), 2), item_shape=(2, 3, 3))
    assert moe(torch.randn(2, 3, 2, 3, 3), torch.randn(2, 3, 4)).shape == (2, 3, 18)
    image = torch.randn(1, 1, 2, 3, 3).expand(2, 3, -1, -1, -1)  # a mean of equal items is the item
    assert_close(moe(image, torch.randn(2, 3, 4)), image.flatten(2))


@kinds
def test_autocast(case, experts):
    """The experts compute in bfloat16, the router does not, and gradients are those of float32 parameters."""
    moe, x = make_soft_moe(case, experts), torch.randn(9, 8)
    expected, weight = moe(x), moe.routing.weight
    with torch.autocast("cpu", torch.bfloat16):
        output = moe(x)
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert torch.equal(moe.routing.weight, weight)
    assert not weight.requires_grad
    assert_close(output.float(), expected, rtol=0.05, atol=0.05)
    assert {parameter.grad.dtype for parameter in moe.parameters()} == {torch.float32}


def save_and_load(moe):
    """Through a file, into a layer made anew."""
    file = io.BytesIO()
    torch.save(moe.state_dict(), file)
    twin = copy.deepcopy(moe)
    for parameter in twin.parameters():
        nn.init.zeros_(parameter)
    file.seek(0)
    twin.load_state_dict(torch.load(file, weights_only=True))
    return twin


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda moe: pickle.loads(pickle.dumps(moe)), save_and_load])
def test_copies_compute_the_same_and_leave_the_last_batch_behind(case, copied):
    moe, x = make_soft_moe(case, "modules"), torch.randn(9, 8)
    expected, twin = moe(x), copied(moe)
    assert twin.routing is None
    assert torch.equal(twin(x), expected)


def test_checkpoints_of_every_version_have_these_names(case):
    """Those of 0.1.0, where the layer was a `MoE`, load as they are."""
    moe = SoftMoE(SOFT_CASES[case](8, 3), GroupedFeedForward(3, 8, 16), shared=nn.Linear(8, 8))
    names = ["router.scale", "router.gate.weight", "experts.weight_in", "experts.weight_out"]
    assert [*moe.state_dict()] == [*names, "shared.weight", "shared.bias"]
    assert isinstance(moe.router, Soft)
