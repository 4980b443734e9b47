"""What is not finite stops the training and is named; what float16 alone cannot hold is skipped."""

import copy
import math
from collections import deque
from dataclasses import replace
from itertools import islice

import pytest
import torch
from torch import nn

from gatewright.train import OptimConfig, TrainingDiverged
from gatewright.train.diagnosis import MAX_STEPS
from tests.train.engines import IMAGES, MIXTURE, SGD, classifier, engine_for, linear, train_for, weights
from tests.train.runs import batches_of, differences


class Overflowing(nn.Module):
    """Passes its input on, and makes the gradient infinite where that is asked for."""

    overflow = False

    def forward(self, x):
        if self.overflow:
            x = x + 0  # not the input itself, which may be a leaf
            x.register_hook(lambda gradient: gradient * math.inf)
        return x


def test_float16_skips_a_step_that_overflows_and_goes_on():
    model = nn.Sequential(linear(), Overflowing())
    engine = engine_for(model=model, precision="float16")
    train_for(engine, 2)
    before, scale = weights(model), engine.scaler.get_scale()
    model[1].overflow = True
    train_for(engine, 1)
    assert differences(weights(model), before) == []
    assert engine.scaler.get_scale() == scale / 2
    model[1].overflow = False
    train_for(engine, 1)
    assert len(differences(weights(model), before)) == 4
    assert engine.step_count == 4


def test_float16_that_overflows_at_any_scale_diverged():
    model = nn.Sequential(linear(), Overflowing())
    model[1].overflow = True
    with pytest.raises(TrainingDiverged, match=r"The gradient norm became nan at step 17; .* is 0.1.weight"):
        train_for(engine_for(model=model, precision="float16"), 30)


class Scale(nn.Module):
    def __init__(self, factor):
        super().__init__()
        self.factor = factor

    def forward(self, x):
        return x * self.factor


@pytest.mark.parametrize(("precision", "factor"), [("float32", 1e38), ("float16", 1e4)])
def test_a_layer_that_overflows_is_named(precision, factor):
    """Also one that overflows in half precision alone."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), Scale(1e3), Scale(factor), nn.Linear(8, 4))
    with pytest.raises(TrainingDiverged, match=r"at step 1; the first layer that is not finite is 3\. "):
        train_for(engine_for(model=model, precision=precision), 1)


def test_a_loss_of_its_own_is_named():
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 4), Scale(1.0))
    optim = replace(SGD, label_smoothing=0.5)
    engine = engine_for(optim=optim, model=model)
    model[2].factor = 3e38  # finite logits, whose differences are not
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.copy_(torch.tensor([1.0, -1.0, 1.0, -1.0]))
    with pytest.raises(TrainingDiverged, match="first layer that is not finite is the loss itself"):
        train_for(engine, 1)


@pytest.mark.parametrize(("clip_norm", "bad"), [(None, math.nan), (1.0, math.inf)])
def test_a_gradient_that_is_not_finite_is_named(clip_norm, bad):
    model = linear()
    model[3].bias.register_hook(lambda gradient: gradient * bad)
    before = weights(model)
    expected = r"The gradient norm became (nan|inf) at step 1; the first layer that is not finite is 3.bias\. "
    with pytest.raises(TrainingDiverged, match=expected):
        train_for(engine_for(optim=replace(SGD, clip_norm=clip_norm), model=model), 1)
    assert differences(weights(model), before) == []


def test_a_failure_is_found_later_and_no_step_after_it_changes_the_weights():
    """Also where another parameter than the one without a finite gradient is meant, and by every optimizer."""
    for name in ("sgd", "adamw", "muon"):
        model = nn.Sequential(linear(), Overflowing(), nn.LayerNorm(4))
        engine = engine_for(optim=OptimConfig(name=name, lr=0.01, weight_decay=0.0), model=model)
        batches = batches_of(IMAGES, 16)
        engine.step([next(batches)])
        before = weights(model)
        model[1].overflow = True
        engine.step([next(batches)])
        model[1].overflow = False
        engine.step([next(batches)])
        assert differences(weights(model), before) == []
        with pytest.raises(TrainingDiverged, match="The gradient norm became nan at step 2"):
            engine.state_dict()


def test_a_failure_is_found_after_a_few_steps_at_the_latest():
    engine = engine_for(model=linear())
    with torch.no_grad():
        engine.model[1].weight[0, 0] = math.nan
    with pytest.raises(TrainingDiverged, match=r"The loss became nan at step 1; .* is 1\.weight") as diverged:
        deque((engine.step([batch]) for batch in islice(batches_of(IMAGES, 8), MAX_STEPS + 1)), maxlen=0)
    assert (engine.step_count, diverged.value.step) == (MAX_STEPS, 0)


def test_the_diagnosis_leaves_the_model_as_it_was():
    model = classifier(MIXTURE)
    engine = engine_for(MIXTURE, model=model)
    train_for(engine, 2)
    norms = [model.network.features[index] for index in (1, 4)]
    for norm in norms:
        norm.momentum = 0.0  # so that the statistics of the step itself change nothing
    for expert in model.network.mixture.experts.experts:
        expert[0] = nn.Sequential(expert[0], Scale(math.inf))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingDiverged, match=r"is network.mixture.experts.experts.0.0.1\. "):
        train_for(engine, 1, batch_size=8)
    counted = [f"/network.features.{index}.num_batches_tracked" for index in (1, 4)]
    assert differences(model.state_dict(), before) == counted
    assert [int(norm.num_batches_tracked) for norm in norms] == [3, 3]  # by the forward of the step, not the diagnosis
    assert all(module.training and not module._forward_hooks for module in model.modules())
