"""A network of a few hundred parameters, and steps of it on one process or spread over several."""

import functools

import torch
from torch import nn

from gatewright import ModuleExperts
from gatewright.data import DataConfig
from gatewright.models import CnnConfig
from gatewright.parallel import expert_mesh
from gatewright.train import OptimConfig, RunConfig
from gatewright.train.phases import upcycled
from gatewright.train.step import TorchEngine
from gatewright.train.strategies.ddp import DDPStrategy
from gatewright.train.strategies.fsdp import FSDPStrategy
from tests.cases import EXPERT_CASES, NUM_EXPERTS, mixture_of, run_beside

STEPS, SAVED, FURTHER = 20, 10, 10


def normalized(num_experts, dim):
    """Experts with BatchNorm, at their beginning too: some get one row in a step, and some none.

    Of two rows that are nearly equal it would make much of the last digit, were it not for a large epsilon.
    """

    def expert():
        return nn.Sequential(nn.BatchNorm1d(dim, eps=0.1), nn.Linear(dim, dim), nn.BatchNorm1d(dim, eps=0.1), nn.Tanh())

    return ModuleExperts(expert, num_experts)


class Network(nn.Module):
    """A layer with BatchNorm, a mixture, a classifier."""

    def __init__(self, router, experts, norm, *, dense=False):
        super().__init__()
        self.before = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), norm(8), nn.Tanh())
        mixture = mixture_of(router, EXPERT_CASES.get(experts, normalized)(NUM_EXPERTS, 8))
        self.mixture = mixture.experts.experts[0] if dense else mixture
        self.after = nn.Linear(8, 3)

    def forward(self, images):
        return self.after(run_beside(self.mixture, self.before(images.to(self.after.weight)), images))


@functools.cache
def mesh_of(ep_size):
    return expert_mesh(ep_size)


def several(ep_size, shard="none", *, background=False):
    return (FSDPStrategy if shard == "fsdp" else DDPStrategy)(mesh_of(ep_size), background=background)


def network_of(router="noisy-top-k", experts="modules", norm=nn.BatchNorm1d, dtype=torch.float64, *, dense=False):
    torch.manual_seed(0)
    return Network(router, experts, norm, dense=dense).to(dtype)


def engine_for(model, strategy, optimizer="adamw", **optim):
    config = RunConfig(
        recipe="test",
        model=CnnConfig(),  # whatever: the engine is given its network
        data=DataConfig(),
        optim=OptimConfig(name=optimizer, lr=0.02, clip_norm=0.5, warmup_epochs=0, schedule="constant", **optim),
        channels_last=False,
    )
    return TorchEngine(model, config, device=torch.device("cpu"), steps_per_epoch=STEPS, strategy=strategy)


def engine_of(strategy, router="noisy-top-k", experts="modules", norm=nn.BatchNorm1d, dtype=torch.float64, **optim):
    return engine_for(network_of(router, experts, norm, dtype), strategy, **optim)


def train_phases(strategy, upcycle_at, router="noisy-top-k", experts="modules", **optim):
    """Train a dense network, and from a step on the mixture of its copies."""
    engine = engine_for(network_of(router, experts, dense=True), strategy, **optim)
    reports = train(engine, 0, upcycle_at)
    engine = upcycled(engine, network_of(router, experts), lambda model: engine_for(model, strategy, **optim))
    return reports + train(engine, upcycle_at), engine


def batches(count, size=13):
    generator = torch.Generator().manual_seed(5)
    images = torch.rand(count, size, 1, 4, 4, generator=generator)
    return list(zip(images, torch.randint(3, (count, size), generator=generator), strict=True))


def train(engine, start=0, stop=STEPS, accumulate=True, order=slice(None)):
    reports = []
    for number, batch in enumerate(batches(SAVED + FURTHER)[start:stop], start):
        batch = (batch[0][order], batch[1][order])
        micro_batches = (
            [(batch[0][:7], batch[1][:7]), (batch[0][7:], batch[1][7:])] if accumulate and number % 2 else [batch]
        )
        reports.append(engine.step(micro_batches))
    return reports


def largest_difference(state, expected):
    assert state.keys() == expected.keys()
    tensors = (name for name in state if isinstance(state[name], torch.Tensor))
    return max(float((state[name].double() - expected[name].double()).abs().max()) for name in tensors)
