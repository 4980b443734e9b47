"""A network of a few hundred parameters, and configs and steps of it by DeepSpeed's engine and by torch's."""

import functools
import importlib.util
import json
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gatewright import MoE
from gatewright.models import DigitsConfig
from gatewright.parallel import expert_mesh
from gatewright.recipes import RECIPES
from gatewright.train import OptimConfig, RunConfig
from gatewright.train.config import DeepSpeedConfig, ParallelConfig
from gatewright.train.strategies.ddp import DDPStrategy
from tests.cases import EXPERT_CASES, make_router, run_beside

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
        mixture = MoE(make_router(router, 8, 4, 2), EXPERT_CASES[experts](4, 8))
        self.mixture = mixture.experts.experts[0] if dense else mixture
        self.after = nn.Linear(8, 3)

    def forward(self, images):
        return self.after(run_beside(self.mixture, self.before(images.to(self.after.weight.dtype)), images))


@functools.cache
def several(ep_size):
    return DDPStrategy(expert_mesh(ep_size))


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


def batches(count, size=8):
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, size, 1, 4, 4, generator=generator)
    return list(zip(images, torch.randint(3, (count, size), generator=generator), strict=True))


def train(engine, start=0, stop=STEPS):
    """Make steps of a run."""
    per_step = engine.config.optim.accumulation_steps
    found, reports = batches(STEPS * per_step), []
    for step in range(start, stop):
        reports.append(engine.step(found[step * per_step : (step + 1) * per_step]))
    return reports


def largest_difference(state, expected):
    assert state.keys() == expected.keys()
    tensors = [name for name in state if isinstance(state[name], torch.Tensor)]
    return max(float((state[name].double() - expected[name].double()).abs().max()) for name in tensors)


def zero(stage, **settings):
    return {"zero_optimization": {"stage": stage}, **settings}
