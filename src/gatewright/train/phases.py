"""The phases of a run: a dense network until an epoch, then a mixture of its copies, each with an engine of its own."""

from collections.abc import Callable, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from gatewright.surgery import upcycled_state
from gatewright.train.config import RunConfig
from gatewright.train.state import load_weights, logical_state
from gatewright.train.step import TorchEngine


def dense_phase(config: RunConfig) -> RunConfig:
    """Return a run whose network is the dense twin, which is trained before `upcycle_epoch`."""
    return replace(config, model=replace(config.model, num_experts=1, upcycle_epoch=0))


def is_dense(config: RunConfig, epoch: int) -> bool:
    """Whether a run trains the dense twin in an epoch, before its experts begin as copies of one network."""
    return config.model.num_experts > 1 and epoch < config.model.upcycle_epoch


def upcycled(engine: TorchEngine, mixture: nn.Module, make_engine: Callable[[nn.Module], TorchEngine]) -> TorchEngine:
    """Return an engine that goes on with a mixture whose experts are copies of a dense network's module.

    Every copy gets the weights, their running average and what the optimizer keeps of the module that it is a copy of:
    sparse upcycling (https://arxiv.org/abs/2212.05055) in the middle of a run. Routers are as the mixture has them, and
    the optimizer knows nothing of them yet. Schedule, loss scale, step count and random state go on.
    """
    state = logical_state(engine)
    state["optimizers"] = [upcycled_state(kept, mixture) for kept in state["optimizers"]]
    average = state["average"] and _upcycled_weights(state["average"], mixture)
    state["model"] = _upcycled_weights(state["model"], mixture)
    load_weights(mixture, state["model"])
    following = make_engine(mixture)
    # The mixture may have an optimizer for parameters such as the dense network had none.
    state["optimizers"] += [{} for _ in following.optimizers[len(state["optimizers"]) :]]
    following.load_logical_state({**state, "average": average})
    return following


def _upcycled_weights(dense: Mapping[str, Tensor], mixture: nn.Module) -> dict[str, Tensor]:
    own = {name: value.detach().clone() for name, value in mixture.state_dict().items()}
    return {**own, **upcycled_state(dense, mixture)}


def seeded(config: RunConfig, build: Callable[[], nn.Module]) -> nn.Module:
    """Build a network whose parameters depend on the run's seed alone, and leave the random state as it is."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return build()
