"""From the engine of a dense network to that of a mixture: what is carried over, and what begins."""

import pytest
import torch
from torch.testing import assert_close

from gatewright import ModuleExperts, MoE, TopK
from gatewright.models import DigitsConfig, ResNetsConfig
from gatewright.train import OptimConfig
from gatewright.train.phases import dense_phase, seeded, upcycled
from tests.train.engines import classifier, config, engine_for, train_for
from tests.train.runs import image_set, make_engine

RESNETS = ResNetsConfig(num_experts=3, router="top-k", router_options={"score_after_top_k": True}, gate_size=8)
DIGITS = DigitsConfig(num_experts=3, width=8)
ADAMW = OptimConfig(lr=3e-3, ema_decay=0.5)
MUON = OptimConfig(name="muon", lr=0.01)


def phases(model, optim=ADAMW, shape=(3, 16, 16), steps=3, **changes):
    """The engine of a dense network after some steps, with its outputs, and that of the mixture."""
    run = config(model, optim, **changes)
    dense = make_engine(classifier(dense_phase(run).model, shape), dense_phase(run))
    train_for(dense, steps, batch_size=8, images=image_set(16, channels=shape[0], size=shape[1]))
    images = torch.rand(5, *shape)
    outputs = [model.eval()(images).detach() for model in (dense.model, dense.evaluated)]
    mixture = seeded(run, lambda: classifier(model, shape))
    return dense, upcycled(dense, mixture, lambda network: make_engine(network, run)), images, outputs


def test_the_function_does_not_jump_and_neither_does_the_averages():
    dense, engine, images, (last, average) = phases(RESNETS)
    assert_close(engine.model.eval()(images), last, atol=1e-6, rtol=1e-6)
    assert_close(engine.evaluated.eval()(images), average, atol=1e-6, rtol=1e-6)
    assert not torch.allclose(last, average)
    assert engine.step_count == dense.step_count == 3
    assert int(engine.average.n_averaged) == 3


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_the_optimizer_goes_on_with_each_copy_and_begins_with_the_router(name):
    dense, engine, _, _ = phases(DIGITS, OptimConfig(name=name, lr=3e-3), (1, 8, 8))
    before, after = (
        {key: value for kept in each.state_dict()["optimizers"] for key, value in kept.items()}
        for each in (dense, engine)
    )
    for key, value in before.items():
        place, inner = key.split("mixture.") if "mixture." in key else (key, None)
        keys = [key] if inner is None else [f"{place}mixture.experts.experts.{i}.{inner}" for i in range(3)]
        assert all(torch.equal(after[copy], value) for copy in keys)
    assert not any("router" in key for key in after)
    pointers = [value.data_ptr() for value in after.values()]
    assert len(set(pointers)) == len(pointers)  # a copy's moments are its own
    train_for(engine, 1)
    assert any("router" in key for kept in engine.state_dict()["optimizers"] for key in kept)


def test_an_optimizer_that_only_the_mixture_needs_begins():
    """Muon leaves a gate to AdamW, and a network of one matrix leaves it nothing."""
    dense = engine_for(model=torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 4, bias=False)), optim=MUON)
    assert len(dense.optimizers) == 1
    experts = ModuleExperts(lambda: torch.nn.Linear(64, 4, bias=False), 2)
    mixture = torch.nn.Sequential(torch.nn.Flatten(), MoE(TopK(64, 2, 2), experts))
    engine = upcycled(dense, mixture, lambda network: engine_for(model=network, optim=MUON))
    train_for(engine, 2)
    assert len(engine.optimizers) == 2


def test_the_router_is_the_seeds_and_the_random_state_goes_on():
    torch.manual_seed(5)
    expected = torch.rand(3)
    routers = []
    for seed in (1, 1, 2):
        torch.manual_seed(5)
        model = seeded(config(RESNETS, seed=seed), lambda: classifier(RESNETS, (3, 16, 16)))
        assert torch.equal(torch.rand(3), expected)
        routers.append(model.network.router_features[0].weight)
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
