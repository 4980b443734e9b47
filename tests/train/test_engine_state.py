"""A state goes on as if nothing had happened, or is refused."""

from dataclasses import replace
from itertools import islice

import pytest
import torch

from gatewright.train import OptimConfig
from gatewright.train.checkpoint.format import load_checkpoint, save_checkpoint
from tests.train.engines import DENSE, IMAGES, MIXTURE, SGD, classifier, config, engine_for
from tests.train.runs import batches_of, differences, make_engine

VARIANTS = {
    "muon": (MIXTURE, OptimConfig(name="muon", lr=0.01, adam_lr=1e-3, schedule="linear"), {}),
    "biased": (replace(MIXTURE, router="biased"), OptimConfig(lr=3e-3, ema_decay=0.9), {}),
    "float16": (MIXTURE, OptimConfig(lr=3e-3), {"precision": "float16", "channels_last": False}),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_state_through_a_file_goes_on_bit_by_bit(variant, tmp_path):
    steps = 3
    model_config, optim, changes = VARIANTS[variant]

    def engine():
        return make_engine(classifier(model_config), config(model_config, optim, **changes), steps_per_epoch=2)

    batches = list(islice(batches_of(IMAGES, 8), 6))
    whole = engine()
    for batch in batches[:steps]:
        whole.step([batch])
    path = save_checkpoint({"engine": whole.state_dict()}, tmp_path, steps)
    torch.manual_seed(99)
    second = engine()
    second.load_state_dict(load_checkpoint(path)["engine"])
    for batch in batches[steps:]:
        whole.step([batch])
        second.step([batch])
    assert differences(second.state_dict(), whole.state_dict()) == []
    layouts = [[p.stride() for p in engine.model.parameters()] for engine in (whole, second)]
    assert layouts[0] == layouts[1]


def test_a_resumed_run_takes_the_rates_of_its_config():
    state = engine_for(optim=SGD).state_dict()
    engine = engine_for(optim=replace(SGD, lr=0.025, weight_decay=0.5))
    engine.load_state_dict(state)
    assert engine.step([next(batches_of(IMAGES, 8))]).learning_rate == 0.025
    assert engine.optimizers[0].param_groups[0]["weight_decay"] == 0.5


@pytest.mark.parametrize(
    ("optim", "precision"),
    [(replace(SGD, name="adamw"), "float32"), (replace(SGD, ema_decay=0.5), "float32"), (SGD, "float16")],
)
def test_a_state_of_other_settings_is_refused(optim, precision):
    state = engine_for().state_dict()
    with pytest.raises(ValueError, match=r"A run goes on with .* as it began: .* was .* and is "):
        engine_for(optim=optim, precision=precision).load_state_dict(state)


def test_a_state_of_another_model_is_refused():
    state = engine_for(DENSE).state_dict()
    with pytest.raises(ValueError, match="The checkpoint holds another model than this config describes"):
        engine_for(replace(DENSE, width=4)).load_state_dict(state)


def test_a_state_of_experts_that_began_inside_the_mixture_is_refused_with_its_reason():
    state = engine_for().state_dict()
    state["model"]["network.mixture._extra_state"] = torch.tensor(False)
    with pytest.raises(ValueError, match="of an earlier version, in which experts that begin as one network"):
        engine_for().load_state_dict(state)


def test_the_expert_bias_moves_once_per_optimizer_step_and_is_saved():
    """However many micro-batches a step has; by the rate or not at all, for each expert."""
    engine = engine_for(replace(MIXTURE, router="biased"))
    before = torch.zeros(3)
    for step in range(1, 4):
        engine.step(list(islice(batches_of(IMAGES, 8), 3)))
        bias = engine.state_dict()["model"]["network.mixture.router.expert_bias.bias"].clone()
        moved = ((bias - before) / 0.001).round()
        assert moved.abs().max() == 1
        torch.testing.assert_close(bias, before + 0.001 * moved, rtol=0, atol=1e-8)
        before = bias
        assert engine.step_count == step
