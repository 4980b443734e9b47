"""A network of a few hundred parameters, and configs and steps of it by DeepSpeed's engine and by torch's."""

import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gatewright.models import DigitsConfig
from gatewright.recipes import RECIPES
from gatewright.train import OptimConfig, RunConfig
from gatewright.train.config import DeepSpeedConfig, ParallelConfig
from tests.cases import EXPERT_CASES, mixture_of, run_beside
from tests.train.spread import batches, several

STEPS = 12
ADAMW = OptimConfig(lr=0.02, clip_norm=0.5, schedule="linear", warmup_epochs=0.5, ema_decay=0.9)
PLAIN = replace(ADAMW, clip_norm=None, ema_decay=None)
ARTICLE = json.loads((Path(__file__).parents[3] / "deploy" / "article.json").read_text())

installed = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is not installed: pip install 'gatewright[deepspeed]'",
)


class Network(nn.Module):
    """A layer with BatchNorm, a mixture, a classifier."""

    def __init__(self, router, experts, *, dense=False):
        super().__init__()
        self.before = nn.Sequential(nn.Flatten(), nn.Linear(16, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh())
        mixture = mixture_of(router, EXPERT_CASES[experts](4, 8))
        self.mixture = mixture.experts.experts[0] if dense else mixture
        self.after = nn.Linear(8, 3)

    def forward(self, images):
        return self.after(run_beside(self.mixture, self.before(images.to(self.after.weight.dtype)), images))


def config_of(ep_size=2, optim=ADAMW, settings=None, folder=None, trust=False, **changes):
    """A run; the engine is given its network, and DeepSpeed its settings as a file."""
    path = None
    if settings is not None:
        path = f"{folder}/settings-{os.getpid()}.json"
        with open(path, "w") as file:
            json.dump(settings, file)
    return RunConfig(
        recipe="test",
        model=DigitsConfig(),
        data=replace(RECIPES["digits"]().data, batch_size=8),
        optim=optim,
        parallel=ParallelConfig(ep_size=ep_size),
        engine="deepspeed",
        deepspeed=DeepSpeedConfig(config=path, trust_checkpoint=trust),
        **{"device": "cpu", "channels_last": True} | changes,
    )


def engine_of(
    kind, config, *, router="noisy-top-k", experts="modules", dense=False, dtype=torch.float32, model=None, **options
):
    torch.manual_seed(0)
    model = Network(router, experts, dense=dense).to(dtype) if model is None else model
    options |= {"device": torch.device("cpu"), "steps_per_epoch": STEPS, "strategy": several(config.parallel.ep_size)}
    return kind(model, config, **options)


def train(engine, start=0, stop=STEPS):
    per_step = engine.config.optim.accumulation_steps
    found, reports = batches(STEPS * per_step, size=8), []
    for step in range(start, stop):
        reports.append(engine.step(found[step * per_step : (step + 1) * per_step]))
    return reports


def zero(stage, **settings):
    return {"zero_optimization": {"stage": stage}, **settings}
