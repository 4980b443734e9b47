"""What DeepSpeed recognises, reduces and saves of our layer: its contract, line by line, on its own engine."""

import copy
import functools
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from gatewright import ModuleExperts, MoE, TopK, aux_loss
from gatewright.parallel import expert_mesh, expert_parameters, parallelize
from gatewright.parallel.deepspeed import adapt_to_deepspeed, plain_state
from tests.cases import EXPERT_CASES
from tests.train.test_deepspeed_engine import installed

needs_deepspeed = [installed, pytest.mark.distributed]


class Network(nn.Module):
    """A layer that has what DeepSpeed stumbles over: BatchNorm in experts, and its word elsewhere in a name."""

    def __init__(self, experts="modules-batch-norm", num_experts=4):
        super().__init__()
        make = EXPERT_CASES.get(experts, with_batch_norm)
        shared = nn.ModuleDict({"expert": nn.Linear(8, 8)})
        shared.forward = lambda x: shared["expert"](x)
        self.block = MoE(TopK(8, num_experts, 2), make(num_experts, 8), shared=nn.Sequential(nn.Linear(8, 8)))
        self.block.shared.register_module("expert", nn.Identity())
        self.block.shared.expert.register_buffer("scale", torch.full((2,), 3.0))
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.block(x))


def with_batch_norm(num_experts, dim):
    return ModuleExperts(lambda: nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim)), num_experts)


@functools.cache
def mesh_of(ep_size):
    return expert_mesh(ep_size)


def spread(ep_size=2, **options):
    torch.manual_seed(0)
    return parallelize(Network(**options), mesh_of(ep_size))


def recognised(experts):
    """R1, R2, R3: the class, the tags, the groups; and names that stay."""
    from deepspeed.moe.layer import MoE as Theirs
    from deepspeed.moe.utils import has_moe_layers, is_moe_param

    plain = spread(experts=experts)
    names, state = list(dict(plain.named_parameters())), plain.state_dict()
    model = adapt_to_deepspeed(plain)
    assert isinstance(model.block, Theirs)
    assert isinstance(model.block, MoE)
    assert has_moe_layers(model) == (True, 4)
    assert (model.block.num_local_experts, model.block.expert_group_name) == (2, "ep_size_2")
    parameters = dict(model.named_parameters())
    assert list(parameters) == names
    tagged = {name for name, parameter in parameters.items() if is_moe_param(parameter)}
    assert tagged == {name for name, _ in expert_parameters(model)}
    assert {parameters[name].group_name for name in tagged} == {"ep_size_2"}
    check_state(model, state)
    check_state(copy.deepcopy(model), state)
    return True


def check_state(model, state):
    """C1, C2: an expert's keys match DeepSpeed's pattern, no other key has its word, and both kinds of names load."""
    theirs = model.block.state_dict()
    places = {key: re.match(r".*\.deepspeed_moe\.experts\.deepspeed_experts\.([0-9]+)\.", f"block.{key}") for key in theirs}
    assert {place[1] for place in places.values() if place} == {"0", "1"}
    assert not [key for key, place in places.items() if "expert" in key and not place]
    ours = plain_state(model)
    assert ours.keys() == state.keys()
    for names in (model.state_dict(), state):
        for tensor in model.state_dict().values():
            tensor.zero_()
        if names is not state:
            names = {key: value + 1 for key, value in names.items()}
        model.load_state_dict(names)
        expected = state if names is state else {key: torch.ones_like(value) for key, value in state.items()}
        assert all(torch.equal(value, expected[key]) for key, value in plain_state(model).items())
