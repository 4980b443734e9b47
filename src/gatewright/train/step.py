"""The plain torch engine: precision, accumulation, clipping, averaging, and one optimizer step at a time."""

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim import Optimizer

from gatewright.layers.base import RoutedLayer, end_step, moe_layers, seed_noise
from gatewright.routing import Routing
from gatewright.routing_sums import RoutingSums
from gatewright.scope import noise_key
from gatewright.tasks import Batch, Rule, task_named
from gatewright.train.config import RunConfig
from gatewright.train.device import autocast
from gatewright.train.diagnosis import FiniteCheck, Step, first_non_finite
from gatewright.train.optim import averaged, build_optimizers, rate_factor, set_learning_rate, stop_at
from gatewright.train.state import load_logical_state, load_weights, logical_state
from gatewright.train.strategies.single import ALONE, Strategy


@dataclass(frozen=True)
class StepReport:
    """What one optimizer step did; its tensors are on the device, and whoever reads one waits for the step.

    Args:
        task_loss: Mean of the task's loss over the micro-batches.
        aux_loss: Mean of the coefficients times the auxiliary losses.
        learning_rate: The rate of the first parameter group.
        gradient_norm: The norm of all gradients before clipping.
    """

    task_loss: Float[Tensor, ""]
    aux_loss: Float[Tensor, ""]
    learning_rate: float
    gradient_norm: Float[Tensor, ""]


class TorchEngine:
    """Trains a model, on one process or several.

    Args:
        model: The whole model, on every process the same.
        config: The run.
        device: Device to train on.
        steps_per_epoch: Optimizer steps per epoch.
        strategy: Strategy by which the run is spread over its processes.
        folder: Folder in which an engine writes checkpoints in a format of its own, if it has one.
    """

    needs_process_group = False  # on one process
    libraries: ClassVar[tuple[str, ...]] = ()
    """The packages beside torch whose versions the numbers depend on."""
    decisions: ClassVar[Mapping[str, Rule]] = MappingProxyType({})
    """What becomes of the engine's own settings where a run goes on, by names such as ``"deepspeed.config"``."""

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
        self.finite = FiniteCheck(device)
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
        if not self.scaler.is_enabled():  # A loss scaler sets what it has found itself.
            stop_at(self.finite.failed, self.optimizers)
        self.average = averaged(self.model, self.config.optim.ema_decay)
        if not self.config.compile:
            return network
        mode = "reduce-overhead" if self.config.cuda_graphs else "default"
        return torch.compile(network, mode=mode)  # type: ignore[return-value]

    @property
    def evaluated(self) -> nn.Module:
        """The model to evaluate: the averaged weights where they are kept, else the last ones."""
        return self.model if self.average is None else self.average.module

    def step(self, micro_batches: Sequence[Batch]) -> StepReport:
        """Make one optimizer step on one or more global micro-batches, of which each process computes its part.

        It does not wait for the device, but for `check_finite` once in a while.

        Raises:
            TrainingDiverged: If a loss or the gradient of this step, or of one since the last check, is not finite.
        """
        self.model.train()
        num_steps = self.config.epochs * self.steps_per_epoch
        factor = rate_factor(
            self.config.optim, self.step_count, num_steps=num_steps, steps_per_epoch=self.steps_per_epoch
        )
        set_learning_rate(self._scheduled(), factor)
        losses = self._propagate(micro_batches, self.step_count)
        learning_rate = self._learning_rate()
        norm = self._apply(micro_batches, losses.sum(1))
        end_step(self.model)
        if self.average is not None:
            self.average.update_parameters(self.model)
        self.step_count += 1
        if self.finite.is_due():
            self.check_finite()
        task, auxiliary = losses.mean(0).unbind()
        return StepReport(task, auxiliary, learning_rate, norm)

    def check_finite(self) -> None:
        """Wait for the device, and see that every step since the last check was finite.

        From the first step on that was not, no step has changed the weights.

        Raises:
            TrainingDiverged: If a loss or a gradient was not finite.
        """
        if (step := self.finite.first_failure()) is None:
            return
        if (batch := step.bad_batch) is not None:
            raise step.diverged(self._first_layer(batch))
        self._repeat(step)
        raise step.diverged(first_non_finite(self.model, None))

    def _propagate(self, micro_batches: Sequence[Batch], step: int) -> Float[Tensor, "micro_batches 2"]:
        """Leave the gradients of a step in the parameters; return each micro-batch's global task and auxiliary loss."""
        losses = []
        for place, batch in enumerate(micro_batches):
            self._seed(step * len(micro_batches) + place)
            with self._accumulate(last=place == len(micro_batches) - 1):
                losses.append(self._backward(batch, len(micro_batches)))
            self._add_routing()
        return self.strategy.all_reduce(torch.stack(losses), "mean")

    def _accumulate(self, last: bool) -> contextlib.AbstractContextManager[object]:
        return self.strategy.no_backward_sync(self._network, enabled=not last)

    def _differentiate(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()

    def _scheduled(self) -> list[Optimizer]:
        """Return the optimizers whose learning rate is the run's to set."""
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
                sums = routing.sums.map(torch.clone) if self.config.cuda_graphs else routing.sums  # replayed in place
                self._routed[name] = self._routed[name] + sums if name in self._routed else sums

    def _seed(self, number: int) -> None:
        """Make the randomness of a micro-batch a function of the seed and its number; dropout is each process's own."""
        seed_noise(self.model, self.config.seed, number)
        if self.strategy.world_size > 1:
            torch.manual_seed(noise_key(self.config.seed, number, self.strategy.rank))

    def _backward(self, batch: Batch, num_micro_batches: int) -> Float[Tensor, "2"]:
        own = self._own_part(batch)
        with autocast(self.device, self.config.precision):
            output, auxiliary = self._network(own[0])
        total = self.task.loss(output, own, label_smoothing=self.config.optim.label_smoothing)
        # Its mean over the processes is that over the global batch.
        task = total * self.strategy.world_size / self.task.count(batch)
        self._differentiate((task + auxiliary) / num_micro_batches)
        return torch.stack([task, auxiliary.to(task)]).detach()

    def _own_part(self, batch: Batch) -> Batch:
        """Put this process's part of a global batch onto its device."""
        share = self.strategy.shard_batch(len(batch[0]))
        own = [tensor[share].to(self.device, non_blocking=True) for tensor in batch]
        return tuple(each.contiguous(memory_format=self._layout) if each.dim() == 4 else each for each in own)

    def _apply(self, micro_batches: Sequence[Batch], losses: Float[Tensor, " micro_batches"]) -> Float[Tensor, ""]:
        """Change the weights by the gradients, if all is finite, and return the norm that these had."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.strategy.reduce_gradients(self.model)
        norm = self.strategy.clip_gradients(self.model, self.config.optim.clip_norm)
        self._note(micro_batches, losses, norm)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad()
        self.scaler.update()
        return norm

    def _note(self, micro_batches: Sequence[Batch], losses: Tensor, norm: Tensor) -> None:
        """Have the device look whether a step is finite.

        With a dynamic loss scale an overflow is expected: the scaler skips the step and lowers the scale. Where nothing
        is left to lower, the overflow is the network's own.
        """
        if self.scaler.is_enabled():
            norm = norm.masked_fill(self.scaler.scale(torch.ones_like(norm)) > 1, 0.0)
        self.finite.note(Step(self.step_count, micro_batches, torch.cat([losses, norm.to(losses)[None]])))

    def _repeat(self, step: Step) -> None:
        """Bring back the gradients of a step that was not finite, by the same batches and weights."""
        self._propagate(step.batches, step.number)

    def _first_layer(self, batch: Batch) -> str | None:
        alone = self.strategy.world_size == 1  # Several would have to run the network again together.
        with autocast(self.device, self.config.precision):
            return first_non_finite(self.model, self._own_part(batch)[0] if alone else None)

    def state_dict(self, *, part: bool = False) -> dict[str, Any]:
        """Return all that the next step depends on, the random state included; every process calls this.

        It is one logical state, which the first process gets as one alone would have it; or each its part, to save it.
        """
        return logical_state(self, part=part)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, with the rates and decays of this config, at any number of processes.

        Raises:
            ValueError: If it belongs to another model, or to settings whose state this config does not have.
        """
        self.load_logical_state(state)

    def load_logical_state(self, state: dict[str, Any]) -> None:
        """Go on from what `logical_state` returned."""
        load_logical_state(self, state)

    def weights(self) -> dict[str, Any]:
        """Return the state of the model, under its own names."""
        return self.model.state_dict()

    def load_weights(self, weights: dict[str, Any]) -> None:
        """Load what `weights` returned."""
        load_weights(self.model, weights)

    def fixed_settings(self) -> dict[str, Any]:
        """Return the settings that decide what there is to save, and so cannot change in a resumed run."""
        averaging, loss_scale = self.average is not None, self.scaler.is_enabled()
        return {"optimizer": self.config.optim.name, "averaging": averaging, "loss_scale": loss_scale}


def take_routing(layer: RoutedLayer) -> Routing | None:
    """Return the routing of the last forward and forget it; None where the layer did not run since."""
    routing, layer.routing = layer.routing, None
    return routing
