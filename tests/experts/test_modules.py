"""Modules as experts: how they are made, what they may return, and BatchNorm inside them."""

import copy
import pickle

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import ModuleExperts


class Flexible(nn.Module):
    """Whatever is asked for in place of an output."""

    def __init__(self, returns):
        super().__init__()
        self.layer, self.returns = nn.Linear(3, 3), returns

    def forward(self, x):
        return self.returns(self.layer(x))


class Counted(nn.Linear):
    """A linear layer that notes the size of each batch it gets."""

    def __init__(self):
        super().__init__(3, 3)
        self.batches = []

    def forward(self, x):
        self.batches.append(len(x))
        return super().forward(x)


def test_a_factory_is_called_once_per_expert():
    made = []
    experts = ModuleExperts(lambda: made.append(nn.Linear(3, 3)) or made[-1], num_experts=4)
    assert [id(expert) for expert in experts.experts] == [id(expert) for expert in made]
    assert experts.num_experts == len(made) == 4


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList, lambda modules: nn.Sequential(*modules), iter])
def test_modules_may_come_in_any_collection(kind):
    modules = [nn.Linear(3, 2), nn.Sequential(nn.Linear(3, 9), nn.ReLU(), nn.Linear(9, 2)), nn.Linear(3, 2)]
    experts = ModuleExperts(kind(modules))
    assert list(experts.experts) == modules
    assert experts.output_shape((3,)) == (2,)


SHARED = nn.Linear(3, 3)


@pytest.mark.parametrize(
    ("experts", "message"),
    [
        (lambda: ModuleExperts(lambda: SHARED, 2), "same one was given twice. Pass a factory that makes a new module"),
        (lambda: ModuleExperts(lambda: nn.Linear(3, 3)), "needs num_experts"),
        (lambda: ModuleExperts([nn.Linear(3, 3)], 2), r"num_experts \(2\) is not the number of modules given \(1\)"),
        (
            lambda: ModuleExperts(nn.Linear(8, 8), 4),
            r"One Linear cannot .* \(lambda: nn.Linear\(84, 84\), num_experts=8\), or the modules themselves, such as "
            r"\(\[nn.Linear\(84, 84\), nn.Linear\(84, 84\)\]\)",
        ),
        (lambda: ModuleExperts(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), 4), r"given \(2\). Pass a factory"),
        (lambda: ModuleExperts([]), "at least one expert; got none"),
    ],
)
def test_wrong_collections_are_refused(experts, message):
    with pytest.raises(ValueError, match=message):
        experts()


@pytest.mark.parametrize(
    ("returns", "message"),
    [
        (lambda y: (y, y), r"for 2 rows of shape \(3,\), expert 1 \(Flexible\) returns tuple. Wrap it"),
        (lambda y: y.sum(0), r"returns \(3,\)"),
        (lambda y: torch.cat([y, y]), r"returns \(4, 3\)"),
        (lambda y: y @ y, r"Expert 1 \(Flexible\) does not take items of shape \(3,\): "),
    ],
)
def test_outputs_that_are_not_one_tensor_of_one_row_per_row_are_refused(returns, message):
    with pytest.raises(ValueError, match=message):
        ModuleExperts([nn.Linear(3, 3), Flexible(returns)]).output_shape((3,))


def test_different_output_shapes_are_refused():
    with pytest.raises(ValueError, match=r"expert 0 returns \(2,\) and expert 2 returns \(4,\). Make them agree"):
        ModuleExperts([nn.Linear(3, 2), nn.Linear(3, 2), nn.Linear(3, 4)]).output_shape((3,))


def test_the_output_shape_of_images_with_batch_norm_changes_nothing():
    expert = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, 10))
    experts = ModuleExperts([expert])
    before = copy.deepcopy(experts.state_dict())
    assert experts.output_shape((3, 6, 6)) == (10,)
    assert all(torch.equal(value, before[name]) for name, value in experts.state_dict().items())
    assert expert.training
    assert next(expert.parameters()).device.type == "cpu"


def test_an_idle_expert_is_not_called_and_a_busy_one_once():
    experts = ModuleExperts(Counted, 3)
    experts(torch.randn(7, 3), torch.tensor([4, 0, 1]))
    assert [expert.batches for expert in experts.experts] == [[4], [], [1]]


def test_a_parameter_that_idle_and_busy_experts_share_keeps_its_gradient():
    experts = ModuleExperts([nn.Linear(3, 3), nn.Linear(3, 3)])
    experts.experts[1].weight = experts.experts[0].weight
    rows = torch.randn(4, 3)
    experts(rows, torch.tensor([4, 0])).sum().backward()
    assert_close(experts.experts[0].weight.grad, rows.sum(0).expand(3, 3))
    assert not experts.experts[1].bias.grad.any()


NORMS = {
    "1d": (lambda: nn.BatchNorm1d(3), (3,)),
    "1d-in-time": (lambda: nn.BatchNorm1d(3), (3, 1)),
    "2d": (lambda: nn.BatchNorm2d(3), (3, 1, 1)),
    "deep": (lambda: nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.BatchNorm1d(3), nn.ReLU())), (3,)),
}


def statistics(module):
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


@pytest.mark.parametrize("norm", NORMS)
def test_batch_norm_sees_the_rows_of_its_expert_and_nothing_else(norm):
    build, shape = NORMS[norm]
    experts, rows = ModuleExperts(build, 3), torch.randn(9, *shape)
    alone = copy.deepcopy(experts.experts)
    output = experts(rows, torch.tensor([4, 0, 3]))  # two rows were dropped
    expected = [alone[0](rows[:4]), alone[2](rows[4:7])]
    assert_close(output[:7], torch.cat(expected))
    for expert, plain in zip(experts.experts, alone, strict=True):
        assert_close(statistics(expert), statistics(plain))
    assert int(next(value for name, value in statistics(experts.experts[1]).items() if "tracked" in name)) == 0


@pytest.mark.parametrize("norm", NORMS)
def test_one_row_in_training_uses_running_statistics_and_changes_none(norm):
    build, shape = NORMS[norm]
    experts = ModuleExperts(build, 2)
    experts(5 + 2 * torch.randn(64, *shape), torch.tensor([32, 32]))
    before, row = statistics(experts), torch.randn(1, *shape, requires_grad=True)
    output = experts(row, torch.tensor([0, 1]))
    assert_close(statistics(experts), before)
    assert_close(output, copy.deepcopy(experts.experts[1]).eval()(row))
    output.sum().backward()
    assert row.grad.isfinite().all()
    assert all(module.training for module in experts.modules())


def test_one_image_of_many_pixels_has_statistics_of_its_own():
    experts = ModuleExperts(lambda: nn.BatchNorm2d(3), 1)
    image = torch.randn(1, 3, 4, 4)
    assert_close(experts(image, torch.tensor([1])), nn.BatchNorm2d(3)(image))
    assert experts.experts[0].num_batches_tracked == 1


def test_an_error_inside_batch_norm_leaves_it_in_training():
    experts = ModuleExperts(lambda: nn.BatchNorm1d(3), 1)
    with pytest.raises(RuntimeError):
        experts(torch.randn(1, 4), torch.tensor([1]))
    assert experts.experts[0].training


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda experts: pickle.loads(pickle.dumps(experts))])
def test_copies_treat_one_row_alike(clone):
    experts = ModuleExperts([nn.BatchNorm1d(3), nn.BatchNorm1d(3)])
    row, counts = torch.randn(1, 3), torch.tensor([0, 1])
    twin = clone(experts)
    assert torch.equal(twin(row, counts), experts(row, counts))
    again = ModuleExperts(clone(experts).experts)  # modules that were experts before
    assert torch.equal(again(row, counts), experts(row, counts))
    assert again.experts[1].training


def test_experts_are_called_without_rows_where_they_are_to_be():
    experts = ModuleExperts(Counted, 3)
    experts.call_idle = True
    output = experts(torch.randn(4, 3), torch.tensor([3, 0, 0]))
    assert [expert.batches for expert in experts.experts] == [[3], [0], [0]]
    output[:3].sum().backward()
    assert experts.experts[0].weight.grad.any()
    assert [expert.weight.grad.any().item() for expert in experts.experts] == [True, False, False]
    assert experts(torch.randn(2, 3), torch.tensor([0, 0, 0])).tolist() == [[0.0] * 3] * 2
