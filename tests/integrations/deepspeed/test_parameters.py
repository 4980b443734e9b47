"""What DeepSpeed recognises, reduces and saves of our layer: its contract, line by line, on DeepSpeed itself."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from gatewright import ModuleExperts, MoE, TopK, aux_loss
from gatewright.integrations.deepspeed.parameters import adapt_to_deepspeed, plain_state
from gatewright.parallel import expert_parameters, gather_state, parallelize
from tests.cases import EXPERT_CASES
from tests.integrations.deepspeed.runs import installed
from tests.train.spread import mesh_of

EXPERT = re.compile(r".*\.deepspeed_moe\.experts\.deepspeed_experts\.([0-9]+)\.")
NETWORKS = ["batch-norm", "grouped-relu-bias"]


def with_batch_norm(num_experts, dim):
    return ModuleExperts(lambda: nn.Sequential(nn.Linear(dim, dim), nn.BatchNorm1d(dim)), num_experts)


class Network(nn.Module):
    """A layer with what DeepSpeed stumbles over: buffers in experts, and its word in a name that is no expert's."""

    def __init__(self, experts="batch-norm", num_experts=4):
        super().__init__()
        shared = nn.Sequential()
        shared.add_module("not_an_expert", nn.Linear(8, 8))
        self.block = MoE(
            TopK(8, num_experts, 2), EXPERT_CASES.get(experts, with_batch_norm)(num_experts, 8), shared=shared
        )
        self.out = nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.block(x))


def spread(ep_size=2, **options):
    torch.manual_seed(0)
    return parallelize(Network(**options), mesh_of(ep_size))


def recognised(experts):
    from deepspeed.moe.layer import MoE as Theirs
    from deepspeed.moe.utils import has_moe_layers, is_moe_param

    plain = spread(experts=experts)
    names = list(dict(plain.named_parameters()))
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
    return True


def named(experts):
    plain = spread(experts=experts)
    state = {key: value.clone() for key, value in plain.state_dict().items()}
    adapted = adapt_to_deepspeed(plain)
    for model in (adapted, copy.deepcopy(adapted)):
        theirs = {key: value.clone() for key, value in model.state_dict().items()}
        assert {EXPERT.match(key)[1] for key in theirs if EXPERT.match(key)} == {"0", "1"}
        assert not [key for key in theirs if "expert" in key and not EXPERT.match(key)]
        for names in (theirs, state):
            for tensor in model.state_dict().values():
                tensor.zero_()
            model.load_state_dict(names)
            found = plain_state(model)
            assert found.keys() == state.keys()
            assert all(torch.equal(found[key], state[key]) for key in state)
    return True


def saved(experts, folder):
    """Train by DeepSpeed's own engine, save by it, change everything, load by it."""
    import deepspeed

    from gatewright.integrations.deepspeed.engine import start_deepspeed

    start_deepspeed(torch.device("cpu"))
    model = adapt_to_deepspeed(spread(experts=experts))
    settings = {
        "train_batch_size": 8,
        "optimizer": {"type": "Adam", "params": {"lr": 0.01, "torch_adam": True}},
        "zero_optimization": {"stage": 1},
    }
    engine, *_ = deepspeed.initialize(model=model, model_parameters=model.parameters(), config=settings)
    for _ in range(3):
        engine.backward(engine(torch.randn(4, 8)).square().mean() + aux_loss(model))
        engine.step()
    engine.save_checkpoint(folder, tag="saved")
    state = {key: value.clone() for key, value in plain_state(model).items()}
    for tensor in model.state_dict().values():
        tensor.zero_()
    engine.load_checkpoint(folder, tag="saved")
    found = plain_state(model)
    assert all(torch.equal(found[key], state[key]) for key in state)
    return gather_state(state, model, mesh_of(2))


@installed
@pytest.mark.distributed
@pytest.mark.parametrize("experts", NETWORKS)
@pytest.mark.parametrize("check", [recognised, named])
def test_deepspeed_recognises_the_layer_and_names_stay_ours(ranks, experts, check):
    assert all(ranks(2, check, experts))


@installed
@pytest.mark.distributed
@pytest.mark.parametrize("experts", NETWORKS)
def test_deepspeed_saves_each_expert_once_and_loads_it_where_it_was(ranks, tmp_path, experts):
    whole, _ = ranks(2, saved, experts, str(tmp_path))
    files = sorted((tmp_path / "saved").glob("layer_0_expert_*"))
    assert len(files) == 4
    for number, path in enumerate(files):
        expert = torch.load(path)
        for key, value in expert.items():
            place, inner = key.removeprefix("block.deepspeed_moe.experts.deepspeed_experts.").split(".", 1)
            assert int(place) == number
            name = f"block.experts.{inner}" if experts != "batch-norm" else f"block.experts.experts.{number}.{inner}"
            assert torch.equal(value, whole[name] if experts == "batch-norm" else whole[name][number])
        assert len(expert) == len([key for key in whole if "block.experts" in key]) // (
            4 if experts == "batch-norm" else 1
        )


def groups_in_another_order():
    import deepspeed
    from deepspeed.utils import groups

    deepspeed.init_distributed()
    model = adapt_to_deepspeed(spread())
    before = [table.copy() for table in tables(groups)]
    for table in tables(groups):
        table.clear()
    with pytest.raises(ValueError, match="Leave use_data_before_expert_parallelism out"):
        model.block.set_deepspeed_parallelism(True)
    for table, content in zip(tables(groups), before, strict=True):
        table.clear()
        table.update(content)
    model.block.set_deepspeed_parallelism()
    return True


def tables(groups):
    return [
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ]


def unfit_models():
    nested = Network()
    torch.manual_seed(0)
    for expert in nested.block.experts.experts:
        expert[0] = MoE(TopK(8, 2, 1), with_batch_norm(2, 8))
    for model, words in (
        (Network(num_experts=5), "5 over 2 do not come out even. Use 4 or 6"),
        (Network().block, "got a layer that is the model itself"),
        (nn.ModuleDict({"expert_block": Network()}), "got expert_block.block"),
        (nested, "An expert of layer block has a mixture inside it"),
    ):
        with pytest.raises(ValueError, match=words):
            adapt_to_deepspeed(parallelize(model, mesh_of(2)))
    return True


@installed
@pytest.mark.distributed
@pytest.mark.parametrize(("world", "check"), [(4, groups_in_another_order), (2, unfit_models)])
def test_what_would_go_wrong_later_is_refused_now(ranks, world, check):
    assert all(ranks(world, check))


def test_experts_on_every_process_are_dense_to_deepspeed():
    model = Network()
    names = list(model.state_dict())
    assert type(adapt_to_deepspeed(model).block) is MoE
    assert list(model.state_dict()) == names


def test_importing_gatewright_does_not_import_deepspeed():
    modules = "sys, gatewright.train, gatewright.integrations.deepspeed.parameters"
    code = f"import {modules}; sys.exit('deepspeed' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parent, check=False).returncode == 0
