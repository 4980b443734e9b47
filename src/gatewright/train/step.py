"""The plain torch engine: precision, accumulation, clipping, averaging, and one optimizer step at a time."""

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from gatewright.layers.base import RoutedLayer, end_step, moe_layers, seed_noise
from gatewright.routing import Routing, RoutingSums
from gatewright.scope import noise_key
from gatewright.tasks import Batch, task_named
from gatewright.train.config import RunConfig
from gatewright.train.device import autocast
from gatewright.train.diagnosis import first_non_finite
from gatewright.train.optim import (
    averaged,
    build_optimizers,
    load_named_state,
    named_state,
    rate_factor,
    set_learning_rate,
)
from gatewright.train.strategies.single import ALONE, Strategy
from gatewright.train.weights import load_weights


class TrainingDiverged(RuntimeError):  # noqa: N818 - what happened, as users say it
    """A loss or a gradient was not finite; nothing was saved after the last good checkpoint."""


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did.

    Args:
        task_loss: Mean of the task's loss over the micro-batches.
        aux_loss: Mean of the coefficients times the auxiliary losses.
        learning_rate: The rate of the first parameter group.
        gradient_norm: The norm of all gradients before clipping.
    """

    task_loss: float
    aux_loss: float
    learning_rate: float
    gradient_norm: float


class TorchEngine:
    """Trains a model, on one process or several.

    Args:
        model: The whole model, on every process the same.
        config: The run.
        device: Where to train.
        steps_per_epoch: Optimizer steps per epoch.
        strategy: How the run is spread over its processes.
        folder: Where an engine writes checkpoints in a format of its own, if it has one.
    """

    needs_process_group = False  # on one process

    def __init__(
        self,
        model: nn.Module,
        config: RunConfig,
        *,
        device: torch.device,
        steps_per_epoch: int,
        strategy: Strategy = ALONE,
        folder: Path | None = None,
    ) -> None:
        self.model: nn.Module
        self.task = task_named(config.task)
        self.config, self.device, self.steps_per_epoch = config, device, steps_per_epoch
        layout = torch.channels_last if config.channels_last else torch.contiguous_format
        self.strategy, self.folder = strategy, folder
        self.model = model.to(device).to(memory_format=layout)  # type: ignore[call-overload]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.step_count = 0
        self._routed: dict[str, RoutingSums] = {}
        self._layout = layout
        self._network = self._start()

    @classmethod
    def check(cls, config: RunConfig, world: int, device: torch.device) -> None:
        """Refuse settings that this engine cannot train with, before anything is built."""

    @classmethod
    def prepare(cls, device: torch.device) -> None:
        """Start what this engine needs before a model is built."""

    @classmethod
    def leave(cls) -> None:
        """Leave the process group at the end of a run."""
        dist.destroy_process_group()

    def _start(self) -> nn.Module:
        """Spread the model over the processes, make what changes its weights, and return what to call in training."""
        network = self.strategy.setup(self.model)
        self.optimizers = build_optimizers(self.model, self.config.optim)
        self.average = averaged(self.model, self.config.optim.ema_decay)
        return torch.compile(network) if self.config.compile else network  # type: ignore[return-value]

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate: the averaged weights where they are kept, else the last ones."""
        return self.model if self.average is None else self.average.module

    def step(self, micro_batches: Sequence[Batch]) -> StepReport:
        """Make one optimizer step on one or more global micro-batches, of which each process computes its part.

        Raises:
            TrainingDiverged: If a loss or the gradient is not finite.
        """
        self.model.train()
        num_steps = self.config.epochs * self.steps_per_epoch
        factor = rate_factor(
            self.config.optim, self.step_count, num_steps=num_steps, steps_per_epoch=self.steps_per_epoch
        )
        set_learning_rate(self._scheduled(), factor)
        losses = []
        for place, batch in enumerate(micro_batches):
            self._seed(self.step_count * len(micro_batches) + place)
            with self._accumulate(last=place == len(micro_batches) - 1):
                losses.append(self._backward(batch, len(micro_batches)))
            self._add_routing()
        learning_rate = self._learning_rate()
        gradient_norm = self._update()
        task, auxiliary = (sum(values) / len(losses) for values in zip(*losses, strict=True))
        return StepReport(task, auxiliary, learning_rate, gradient_norm)

    def _accumulate(self, last: bool) -> contextlib.AbstractContextManager[object]:
        return self.strategy.no_backward_sync(self._network, enabled=not last)

    def _propagate(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _stepped(self) -> list[Optimizer]:
        """Return the optimizers that change the weights."""
        return self.optimizers

    def _scheduled(self) -> list[Optimizer]:
        """Return those of them whose learning rate is the run's to set."""
        return self.optimizers

    def _learning_rate(self) -> float:
        rate: float = self.optimizers[0].param_groups[0]["lr"]
        return rate

    def take_sums(self) -> dict[str, RoutingSums]:
        """Return what each MoE layer did in all micro-batches since the last call, and forget it."""
        taken, self._routed = self._routed, {}
        return taken

    def _add_routing(self) -> None:
        for name, layer in moe_layers(self.model):
            if (routing := take_routing(layer)) is not None:
                self._routed[name] = self._routed[name] + routing.sums if name in self._routed else routing.sums

    def _seed(self, number: int) -> None:
        """Make the randomness of a micro-batch a function of the seed and its number; dropout is each process's own."""
        seed_noise(self.model, self.config.seed, number)
        if self.strategy.world_size > 1:
            torch.manual_seed(noise_key(self.config.seed, number, self.strategy.rank))

    def _backward(self, batch: Batch, num_micro_batches: int) -> tuple[float, float]:
        own = self._own_part(batch)
        with autocast(self.device, self.config.precision):
            output, auxiliary = self._network(own[0])
        total = self.task.loss(output, own, label_smoothing=self.config.optim.label_smoothing)
        # Its mean over the processes is that over the global batch.
        task = total * self.strategy.world_size / self.task.count(batch)
        means = self.strategy.all_reduce(torch.stack([task, auxiliary.to(task)]).detach(), "mean")
        if not means.isfinite().all():
            raise TrainingDiverged(self._diagnosis("loss", float(means.sum()), own[0]))
        self._propagate((task + auxiliary) / num_micro_batches)
        return float(means[0]), float(means[1])

    def _own_part(self, batch: Batch) -> Batch:
        """Put this process's part of a global batch onto its device."""
        share = self.strategy.shard_batch(len(batch[0]))
        own = [tensor[share].to(self.device, non_blocking=True) for tensor in batch]
        return tuple(each.contiguous(memory_format=self._layout) if each.dim() == 4 else each for each in own)

    def _update(self) -> float:
        norm = self._apply()
        end_step(self.model)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step_count += 1
        return float(norm)

    def _apply(self) -> Tensor:
        """Change the weights by the gradients, and return the norm that these had."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.strategy.reduce_gradients(self.model)
        norm = self.strategy.clip_gradients(self.model, self.config.optim.clip_norm)
        # With a dynamic loss scale an overflow is expected: the scaler skips the step and lowers the scale. Where
        # nothing is left to lower, the overflow is the network's own.
        if not torch.isfinite(norm) and not (self.scaler.is_enabled() and self.scaler.get_scale() > 1):
            raise TrainingDiverged(self._diagnosis("gradient norm", float(norm), None))
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        return norm

    def _diagnosis(self, what: str, value: float, inputs: Tensor | None) -> str:
        alone = self.strategy.world_size == 1  # Several would have to run the network again together.
        with autocast(self.device, self.config.precision):
            layer = first_non_finite(self.model, inputs if alone else None)
        return (
            f"The {what} became {value} at step {self.step_count + 1}; the first layer that is not finite is "
            f"{layer or 'the loss itself'}. Try a lower `optim.lr`, `optim.clip_norm=1.0` or `precision=float32`."
        )

    def state_dict(self, *, part: bool = False) -> dict[str, Any]:
        """Return all that the next step depends on, the random state included; every process calls this.

        It is one logical state, which the first process gets as one alone would have it; or each its part, to save it.
        """
        return self.logical_state(part=part)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, with the rates and decays of this config, at any number of processes.

        Raises:
            ValueError: If it belongs to another model, or to settings whose state this config does not have.
        """
        self.load_logical_state(state)

    def logical_state(self, *, part: bool = False) -> dict[str, Any]:
        """Return what `state_dict` does of tensors and numbers."""
        gather = partial(self.strategy.local_state if part else self.strategy.gather_state, model=self.model)
        return {
            "settings": self._fixed_settings(),
            "model": gather(self._weights()),
            "optimizers": [gather(named_state(optimizer, self.model)) for optimizer in self.optimizers],
            "scaler": self.scaler.state_dict(),
            "average": None if self.average is None else gather(self.average.module.state_dict()),
            "averaged": 0 if self.average is None else int(self.average.n_averaged),
            "step_count": self.step_count,
            "random_state": torch.get_rng_state(),
            "cuda_random_state": torch.cuda.get_rng_state_all() if self.device.type == "cuda" else [],
        }

    def load_logical_state(self, state: dict[str, Any]) -> None:
        """Go on from what `logical_state` returned."""
        if state["settings"] != self._fixed_settings():
            raise ValueError(
                "A run goes on with the settings that decide what it keeps, as it began: "
                f"{_changes(state['settings'], self._fixed_settings())}. Leave the flags out that change them."
            )
        own = partial(self.strategy.load_state, model=self.model)
        self._load_weights(own(state["model"]))
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            load_named_state(optimizer, own(saved), self.model)
        self.scaler.load_state_dict(state["scaler"])
        if self.average is not None:
            load_weights(self.average.module, own(state["average"]))
            self.average.n_averaged.fill_(state["averaged"])
        self.step_count = state["step_count"]
        torch.set_rng_state(state["random_state"])
        if self.device.type == "cuda" and len(state["cuda_random_state"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all(state["cuda_random_state"])

    def _weights(self) -> dict[str, Any]:
        return self.model.state_dict()

    def _load_weights(self, weights: dict[str, Any]) -> None:
        load_weights(self.model, weights)

    def _fixed_settings(self) -> dict[str, Any]:
        """Return the settings that decide what there is to save, and so cannot change in a resumed run."""
        averaging, loss_scale = self.average is not None, self.scaler.is_enabled()
        return {"optimizer": self.config.optim.name, "averaging": averaging, "loss_scale": loss_scale}


def take_routing(layer: RoutedLayer) -> Routing | None:
    """Return the routing of the last forward and forget it; None where the layer did not run since."""
    routing, layer.routing = layer.routing, None
    return routing


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = (name for name in {**before, **now} if before.get(name) != now.get(name))
    return "; ".join(f"{name.replace('_', ' ')} was {before.get(name)} and is {now.get(name)}" for name in changed)
