"""BatchNorm that counts rows: torch's own numbers where torch has any, and what it does with one value or none."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from gatewright import ModuleExperts
from gatewright.parallel import SyncBatchNorm, synchronize_batch_norm, synchronize_experts
from gatewright.scope import BatchScope

KINDS = {
    "vectors": (nn.BatchNorm1d, {}, (5, 3)),
    "images": (nn.BatchNorm2d, {}, (2, 3, 4, 4)),
    "volumes": (nn.BatchNorm3d, {}, (2, 3, 2, 2, 2)),
    "plain": (nn.BatchNorm1d, {"affine": False}, (5, 3)),
    "averaged": (nn.BatchNorm1d, {"momentum": None}, (5, 3)),
    "untracked": (nn.BatchNorm1d, {"track_running_stats": False}, (5, 3)),
}


def synchronized(norm):
    model = nn.Sequential(copy.deepcopy(norm))
    synchronize_batch_norm(model, BatchScope())
    assert isinstance(model[0], SyncBatchNorm)
    return model[0]


def run(norm, x):
    items = x.clone().requires_grad_()
    output = norm(items)
    (output * torch.linspace(-1, 2, output.numel(), dtype=x.dtype).view_as(output)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in norm.named_parameters()}
    return {"output": output, "items": items.grad, **gradients, **dict(norm.named_buffers())}


def randomized(kind, options):
    norm = kind(3, dtype=torch.float64, **options)
    for tensor in norm.state_dict().values():
        if tensor.is_floating_point():
            nn.init.uniform_(tensor, 0.5, 2.0)
    return norm


@pytest.mark.parametrize("case", KINDS)
def test_on_one_process_it_is_torchs(case):
    kind, options, shape = KINDS[case]
    torch.manual_seed(0)
    norm = randomized(kind, options)
    own = synchronized(norm)
    for _ in range(3):
        x = torch.randn(shape, dtype=torch.float64)
        norm.zero_grad(), own.zero_grad()
        expected, actual = run(norm, x), run(own, x)
        assert actual.keys() == expected.keys()
        for name, value in expected.items():
            assert_close(actual[name], value, msg=f"{case}: {name}")
    assert_close(own.eval()(x), norm.eval()(x))


@pytest.mark.parametrize("affine", [True, False])
def test_one_value_per_channel_is_normalised_as_in_an_expert(affine):
    torch.manual_seed(0)
    expert = nn.Sequential(randomized(nn.BatchNorm1d, {"affine": affine}))
    experts = ModuleExperts([expert])
    own = synchronized(copy.deepcopy(expert[0]))
    before = {name: buffer.clone() for name, buffer in own.named_buffers()}
    x = torch.randn(1, 3, dtype=torch.float64)
    actual, items = run(own, x), x.clone().requires_grad_()
    output = experts(items, torch.tensor([1]))
    (output * torch.linspace(-1, 2, 3, dtype=torch.float64)).sum().backward()
    assert_close(actual["output"], output)
    assert_close(actual["items"], items.grad)
    for name, parameter in expert[0].named_parameters():
        assert_close(actual[name], parameter.grad)
    for name, buffer in before.items():
        assert torch.equal(actual[name], buffer)


class Viewed(nn.Module):
    """A view that no batch of none has."""

    def forward(self, x):
        return x.view(len(x), -1)


def test_an_expert_that_cannot_be_called_without_rows_is_refused_and_left_as_it_is():
    experts = ModuleExperts([nn.Linear(3, 3), nn.Sequential(Viewed(), nn.BatchNorm1d(3))])
    with pytest.raises(ValueError, match=r"Expert 1 \(Sequential\) has a BatchNorm .* x.flatten\(1\) in place of"):
        synchronize_experts(experts, (3,), BatchScope())
    assert not experts.call_idle
    assert type(experts.experts[1][1]) is nn.BatchNorm1d


def test_synchronised_experts_go_by_the_rule_of_their_own_and_others_are_not_called_idle():
    experts, plain = ModuleExperts([nn.BatchNorm1d(3)]), ModuleExperts([nn.Linear(3, 3)])
    for each in (experts, plain):
        synchronize_experts(each, (3,), BatchScope())
    assert (experts.call_idle, plain.call_idle) == (True, False)
    again = ModuleExperts(experts.experts)  # its one row is normalised by the synchronised module itself
    seen = []
    again.experts[0].register_forward_pre_hook(lambda norm, args: seen.append(norm.training))
    again(torch.randn(1, 3), torch.tensor([1]))
    assert seen == [True]
