from dataclasses import replace

import pytest
import torch

from gatewright.data import DataConfig
from gatewright.models import CnnConfig
from gatewright.train import OptimConfig, RunConfig


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"lr": 0.0}, "lr is above 0"),
        ({"lr": float("nan")}, "lr is above 0"),
        ({"lr": float("inf")}, "lr is above 0, .* got inf, None"),
        ({"adam_lr": -1.0}, "so is adam_lr, or None for the same; got 0.001, -1.0"),
        ({"momentum": 1.0}, r"momentum and betas lie in \[0, 1\) .* got 1.0, "),
        ({"betas": (0.9, 1.5)}, r"got 0.9, \(0.9, 1.5\) and 0.01"),
        ({"weight_decay": -1.0}, "weight_decay is not negative; .* and -1.0"),
        ({"accumulation_steps": 0}, "accumulation_steps is at least 1, for no accumulation; got 0"),
        ({"clip_norm": 0.0}, "clip_norm is above 0, or None"),
        ({"ema_decay": 1.0}, "ema_decay lies between 0 and 1"),
        ({"ema_decay": 0.0}, "ema_decay lies between 0 and 1"),
        ({"label_smoothing": 1.0}, "label_smoothing lies in"),
        ({"label_smoothing": -0.1}, "label_smoothing lies in"),
        ({"warmup_epochs": -1.0}, "warmup_epochs is finite and not negative"),
        ({"name": "adam"}, "name is one of 'adamw', 'sgd', 'muon'; got 'adam'"),
        ({"schedule": "cos"}, "schedule is one of 'cosine', 'linear', 'constant'; got 'cos'"),
        ({"warmup": "exp"}, "warmup is one of 'linear', 'log'; got 'exp'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_an_optimizer_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        OptimConfig(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"epochs": 0}, "epochs, checkpoint_every and processes are at least 1; got 0, 1 and 1"),
        ({"checkpoint_every": 0}, "epochs, checkpoint_every and processes are at least 1; got 10, 0 and 1"),
        ({"seed": 2**63}, "seed is an integer of 64 bits; got 9223372036854775808"),
        ({"precision": "fp16"}, "precision is one of 'float32', 'bfloat16', 'float16'; got 'fp16'"),
        ({"model": {"top_k": 9}}, r"top_k \(9\) cannot exceed num_experts \(8\)"),
        ({"model": {"router": "top-j"}}, "No router is called 'top-j'; did you mean 'top-k'?"),
        ({"model": {"router": "top-k", "router_options": {"jiter": 0.1}}}, "did you mean 'jitter'?"),
        ({"model": {"router_options": {"jitter": 0.1}}}, "router noisy-top-k is called 'jitter'. Known: gate_bias"),
        ({"model": {"router": "top-k", "router_options": {"jitter": 2.0}}}, "jitter is at least 0 and below 1"),
        ({"model": {"router": "top-k", "router_options": {"jitter": "much"}}}, "jitter .* is a number; got 'much'"),
        ({"model": {"losses": {"lod": 0.1}}}, "No auxiliary loss is called 'lod'; did you mean 'load'?"),
        ({"model": {"dispatch": "capacity", "capacity_factor": 0.0}}, "capacity_factor is finite and above 0"),
        ({"model": {"dispatch": "dropfull"}}, "dispatch is one of 'dropless', 'capacity'; got 'dropfull'"),
        ({"model": {"num_experts": 0}}, "at least 1; got 1, 0 and 2"),
        ({"model": {"num_experts": 4, "top_k": 0}}, "at least 1; got 1, 4 and 0"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_a_run_that_cannot_be_is_refused_before_any_work(changes, message):
    changes = dict(changes)
    model = CnnConfig(**changes.pop("model", {}))
    with pytest.raises(ValueError, match=message):
        RunConfig(recipe="mine", model=model, data=DataConfig(), **changes)


def test_the_dense_twin_asks_nothing_of_the_router():
    RunConfig(recipe="mine", model=CnnConfig(num_experts=1, top_k=2), data=DataConfig())


def test_a_config_draws_no_random_numbers():
    before = torch.get_rng_state()
    RunConfig(recipe="mine", model=CnnConfig(router="top-k"), data=DataConfig())
    assert torch.equal(torch.get_rng_state(), before)


def test_configs_cannot_be_changed():
    config = RunConfig(recipe="mine", model=CnnConfig(), data=DataConfig())
    with pytest.raises(AttributeError, match="cannot assign"):
        config.epochs = 4
    assert replace(config, epochs=4).epochs == 4
