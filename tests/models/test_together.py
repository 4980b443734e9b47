import copy

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.testing import assert_close

from gatewright import GroupedFeedForward, ModuleExperts, MoE, TopK, aux_loss
from gatewright.models import StartTogether, begin_epoch


def expert():
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Linear(8, 6))


def together(split_epoch=2):
    mixture = MoE(TopK(6, 3, 2, score_after_top_k=True), ModuleExperts(expert, 3))
    return StartTogether(mixture, split_epoch)


def experts_of(model):
    return [module.state_dict() for module in model.mixture.experts.experts]


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one)


def train(model, steps=2, seed=0):
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    for step in range(steps):
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed + step))
        (model(x).square().mean() + aux_loss(model)).backward()
        optimizer.step()
        optimizer.zero_grad()


def test_the_first_expert_serves_all_before_the_split():
    model = together()
    x = torch.randn(5, 6)
    expected = copy.deepcopy(model.mixture.experts.experts[0])(x)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x, torch.randn(5, 6)), expected)  # whatever a router would look at
    before = experts_of(model)
    others = copy.deepcopy(before[1:])
    train(model)
    assert all(same(one, other) for one, other in zip(experts_of(model)[1:], others, strict=True))
    assert model.mixture.routing is None


def test_the_auxiliary_loss_is_zero_before_the_split_and_positive_after():
    model = together()
    model(torch.randn(8, 6))
    assert aux_loss(model) == 0.0
    begin_epoch(model, 2)
    model(torch.randn(8, 6))
    assert aux_loss(model) > 0.0


@pytest.mark.parametrize("epochs", [(0, 1, 2), (2,), (7,)])
def test_experts_are_copies_at_the_split_and_part_after_it(epochs):
    model = together()
    train(model)
    for epoch in epochs:
        assert model.together
        begin_epoch(model, epoch)
    assert not model.together
    first, *others = experts_of(model)
    assert all(same(first, other) for other in others)  # buffers of BatchNorm too
    pointers = {parameter.data_ptr() for parameter in model.mixture.experts.parameters()}
    assert len(pointers) == 3 * 6  # copies, not the same parameters
    train(model)
    assert not any(same(one, other) for one, other in zip(experts_of(model), experts_of(model)[1:], strict=False))


def test_the_function_does_not_jump_at_the_split():
    model = together()
    train(model)
    x = torch.randn(9, 6)
    before = model.eval()(x)
    begin_epoch(model, 2)
    assert_close(model(x), before)


def test_it_splits_once():
    model = together()
    begin_epoch(model, 2)
    train(model)
    before = copy.deepcopy(experts_of(model))
    begin_epoch(model, 3)
    assert all(same(one, other) for one, other in zip(experts_of(model), before, strict=True))


@pytest.mark.parametrize("epoch", [0, 2], ids=["before", "after"])
def test_a_state_dict_knows_its_side_of_the_split(epoch):
    model, other = together(), together()
    begin_epoch(model, epoch)
    train(model)
    state = model.state_dict()
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other.load_state_dict(state)
    assert other.together is model.together is (epoch == 0)
    x = torch.randn(4, 6)
    assert torch.equal(other.eval()(x), model.eval()(x))
    begin_epoch(other, 2)
    begin_epoch(model, 2)
    assert torch.equal(other(x), model(x))


def test_an_older_state_dict_says_it_without_a_tensor():
    model = together()
    model.load_state_dict({**model.state_dict(), "_extra_state": False})
    assert model.together is False


def test_an_averaged_copy_splits_too():
    model = together()
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5), use_buffers=True)
    train(model)
    average.update_parameters(model)
    train(model, seed=5)
    average.update_parameters(model)
    begin_epoch(average, 2)
    assert model.together
    assert not average.module.together
    first, *others = experts_of(average.module)
    assert all(same(first, other) for other in others)
    assert not same(first, experts_of(model)[0])


def test_parts_of_a_model_are_found():
    model = nn.Sequential(together(1), nn.ReLU(), nn.ModuleDict({"deep": together(2)}))
    begin_epoch(model, 1)
    assert (model[0].together, model[2]["deep"].together) == (False, True)


def test_an_epoch_before_the_first_is_refused():
    with pytest.raises(ValueError, match=r"split_epoch is an epoch, counted from 0; got -1\."):
        together(-1)


def test_experts_without_modules_are_refused():
    with pytest.raises(TypeError, match="StartTogether copies modules; got GroupedFeedForward"):
        StartTogether(MoE(TopK(6, 3, 2), GroupedFeedForward(3, 6, 4)), 1)
