"""Layers made on the meta device: `to_empty` and `reset_parameters` give what construction gives, on FSDP2 too."""

import warnings
from functools import partial

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from gatewright import GroupedFeedForward, MergedMoE, ModuleExperts, MoE, NoisyTopK, ResidualMixture, TopK, aux_loss
from gatewright.reset import reset_parts
from gatewright.routers import Router
from tests.cases import EXPERT_CASES, ROUTER_CASES, SOFT_CASES, make_soft_moe, two_layers


def normed(dim):
    return nn.Sequential(nn.Linear(dim, 3), nn.BatchNorm1d(3), nn.Linear(3, dim))


def layers():
    """Every router with both classes of experts, one with every case of them; made as a user makes them."""
    for name, make in {**ROUTER_CASES, **SOFT_CASES}.items():
        layer, sizes = (type(make_soft_moe()), (8, 4)) if name in SOFT_CASES else (MoE, (8, 4, 2))
        router = partial(make, *sizes)
        for kind in EXPERT_CASES if name == "top-k" else ("grouped-relu-bias", "modules"):
            experts = partial(EXPERT_CASES[kind], 4, 8)
            yield f"{name} {kind}", lambda a=layer, r=router, e=experts: a(r(), e(), shared=two_layers(8, 4))
    yield "merged", lambda: MergedMoE(TopK(8, 4), partial(two_layers, 8, 3), 4)
    norms = partial(ModuleExperts, partial(normed, 8), 4)
    yield "residual", lambda: ResidualMixture(MoE(TopK(8, 4), norms()), nn.Linear(8, 8))


def on_meta(make):
    with torch.device("meta"):
        layer = make()
    assert all(tensor.is_meta for tensor in layer.parameters())
    return layer.to_empty(device="cpu")


@pytest.mark.filterwarnings("ignore:.* normalises the one chosen weight")
def test_to_empty_and_reset_parameters_give_what_construction_gives():
    for name, make in layers():
        torch.manual_seed(3)
        expected = {**dict((eager := make()).named_parameters()), **dict(eager.named_buffers())}
        layer = on_meta(make)
        actual = {**dict(layer.named_parameters()), **dict(layer.named_buffers())}
        for tensor in actual.values():  # Memory that says so if nothing is written to it.
            tensor.data.fill_(torch.nan if tensor.is_floating_point() else 77)
        torch.manual_seed(3)
        layer.reset_parameters()
        assert actual.keys() == expected.keys()
        assert [key for key, value in expected.items() if not torch.equal(actual[key], value)] == [], name


def test_forgotten_losses_are_an_error_after_the_meta_device_too():
    layer = on_meta(lambda: MoE(TopK(8, 4), GroupedFeedForward(4, 8, 8)))
    layer.reset_parameters()
    with pytest.raises(RuntimeError, match="auxiliary loss was taken"):
        layer(torch.randn(5, 8)).sum().backward()


class Scaled(nn.Module):
    """Holds a tensor, and does not say where it starts."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(3))


class Lazy(Router):
    """Holds a tensor itself, and inherits `reset_parameters`."""

    def __init__(self):
        super().__init__(3, 2, 1)
        self.table = nn.Parameter(torch.ones(3))

    def forward(self, features, scope=None):
        raise NotImplementedError


def test_tensors_that_nothing_initialises_are_refused_by_name():
    with pytest.raises(ValueError, match=r"1 \(Scaled\) holds scale and has none. Add the method, or load a state"):
        ModuleExperts([nn.Sequential(nn.Linear(3, 3), Scaled())]).reset_parameters()
    with pytest.raises(ValueError, match=r"the router \(Lazy\) holds table and has none"):
        Lazy().reset_parameters()


def a_step_from_meta():
    """Train a model that no process ever held whole; how its first weights were drawn, and what a step moved."""
    with torch.device("meta"):
        layers = [MoE(NoisyTopK(8, 4), EXPERT_CASES[kind](4, 8)) for kind in ("grouped-swiglu-bias", "modules")]
        model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 8), *layers)
    for part in [*layers, model]:
        fully_shard(part, mesh=init_device_mesh("cpu", (2,)))
    model.to_empty(device="cpu")
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "DTensor random operators may not have complete support")
        reset_parts(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [parameter.full_tensor().clone() for parameter in model.parameters()]
    (model(torch.randn(16, 8)).square().sum() + aux_loss(model)).backward()
    optimizer.step()
    moved = [bool((p.full_tensor() != b).any()) for p, b in zip(model.parameters(), before, strict=True)]
    return before[0].std().item(), before[0].abs().max().item(), moved


@pytest.mark.distributed
def test_a_model_on_meta_is_sharded_and_then_initialised(ranks):
    one, other = ranks(2, a_step_from_meta)
    assert one == other
    std, largest, moved = one
    assert all(moved)
    assert std == pytest.approx(24**-0.5, rel=0.1)
    assert largest <= 8**-0.5
