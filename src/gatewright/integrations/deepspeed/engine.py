"""The DeepSpeed engine: its optimizer step and ZeRO in place of torch's, everything else as in `TorchEngine`."""

import contextlib
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from gatewright.extras import require
from gatewright.integrations.deepspeed.parameters import adapt_to_deepspeed, plain_state
from gatewright.integrations.deepspeed.settings import deepspeed_settings, is_half, is_plain, zero_stage
from gatewright.layers import ExpertLayer, MoE, SoftMoE
from gatewright.layers.base import moe_layers
from gatewright.parallel import synchronize_batch_norm
from gatewright.scope import BatchScope
from gatewright.tasks import EXACT, FROM_HERE, Batch, Rule
from gatewright.train.config import RunConfig
from gatewright.train.diagnosis import Step, first_non_finite
from gatewright.train.optim import averaged, build_optimizers
from gatewright.train.step import TorchEngine

KEPT = 2


class DeepSpeedEngine(TorchEngine):
    """Trains a model by `deepspeed.initialize`, on the processes of torch's default group.

    With ZeRO stage 0, float32 and the run's own optimizer, the state is that of `TorchEngine`: any number of processes
    and either engine goes on from it. Otherwise it holds the weights, and the rest is in DeepSpeed's own checkpoint.
    """

    needs_process_group = True
    libraries = ("deepspeed",)
    decisions: ClassVar[Mapping[str, Rule]] = MappingProxyType(
        {"deepspeed.config": FROM_HERE, "deepspeed.trust_checkpoint": EXACT}
    )

    @classmethod
    def check(cls, config: RunConfig, world: int, device: torch.device) -> None:
        """Refuse settings of the run, and of DeepSpeed's JSON, that do not fit together."""
        deepspeed_settings(config, world, on_cpu=device.type == "cpu")

    @classmethod
    def prepare(cls, device: torch.device) -> None:
        """Start DeepSpeed, whose own layer asks it for the device when a model is built."""
        start_deepspeed(device)

    @classmethod
    def leave(cls) -> None:
        """Leave the process group by DeepSpeed's own function where it joined, so that it forgets its groups."""
        theirs = sys.modules.get("deepspeed.comm")
        if theirs is not None and theirs.is_initialized():
            theirs.destroy_process_group()
        else:
            super().leave()

    def _start(self) -> nn.Module:
        self.settings, said = deepspeed_settings(
            self.config, self.strategy.world_size, on_cpu=self.device.type == "cpu"
        )
        if self.strategy.rank == 0:
            print(*said, sep="\n", end="\n" if said else "")
        if single := [name for name, parameter in self.model.named_parameters() if parameter.dim() == 0]:
            raise ValueError(
                "DeepSpeed sends parameters out as bytes, which fails for one without dimensions: "
                f"{', '.join(single)}. Use `engine=torch`."
            )
        deepspeed = start_deepspeed(self.device)
        self._layout = torch.contiguous_format  # DeepSpeed sends parameters out as the bytes that they are in memory.
        self.model.to(memory_format=self._layout)  # type: ignore[call-overload]
        network = self.strategy.setup(self.model, wrap=False)
        if is_half(self.settings):  # DeepSpeed leaves statistics in float32: torch's takes no such pair.
            synchronize_batch_norm(self.model, BatchScope())
        self.average = averaged(self.model, self.config.optim.ema_decay)
        adapt_to_deepspeed(self.model)
        if zero_stage(self.settings) == 3 and any(
            isinstance(layer, ExpertLayer) for _, layer in moe_layers(self.model)
        ):
            deepspeed.utils.set_z3_leaf_modules(self.model, [MoE, SoftMoE])
        optimizer = None if "optimizer" in self.settings else self._own_optimizer()
        parameters = None if optimizer else [p for p in self.model.parameters() if p.requires_grad]
        self._own = [] if optimizer is None else [optimizer]
        self.optimizers = self._own if is_plain(self.settings) else []
        self.engine: Any = deepspeed.initialize(
            model=network, optimizer=optimizer, model_parameters=parameters, config=dict(self.settings)
        )[0]
        zero = zero_stage(self.settings) in (1, 2) and hasattr(self.engine.optimizer, "_coalesce_grad_reduction")
        self._in_order = zero and any(True for _ in moe_layers(self.model))
        self._step_under_way: contextlib.ExitStack | None = None
        return self.engine  # type: ignore[no-any-return]

    def _own_optimizer(self) -> Optimizer:
        """Make the run's optimizer, with experts' parameters in groups of their own."""
        first, *others = build_optimizers(self.model, self.config.optim)
        if others:
            raise ValueError(
                "DeepSpeed takes one optimizer, and `optim.name=muon` is two. Use adamw or sgd, or DeepSpeed's own by "
                "its JSON."
            )
        split = require("deepspeed.moe.utils", "deepspeed").split_params_into_different_moe_groups_for_optimizer
        groups = [{**group, "name": f"group {place}"} for place, group in enumerate(first.param_groups)]
        first.param_groups[:] = split(groups)
        return first

    @contextlib.contextmanager
    def _accumulate(self, last: bool) -> Iterator[None]:
        """Reduce gradients after the last micro-batch only, and with a mixture in an order that is the same everywhere.

        ZeRO 1 and 2 fill their buckets as gradients arrive. That order depends on which experts a process's own images
        chose, and buckets in different orders would add one expert's gradient to another's.
        """
        self.engine.set_gradient_accumulation_boundary(last)
        if self._in_order and self._step_under_way is None:
            self._step_under_way = contextlib.ExitStack()
            self._step_under_way.enter_context(self.engine.coalesce_grad_reduction())
        yield
        if last and self._step_under_way is not None:
            self._step_under_way.close()
            self._step_under_way = None
            self.engine.set_gradient_accumulation_boundary(True)  # The block put back what it was at the beginning.

    def _differentiate(self, loss: Tensor) -> None:
        self.engine.backward(loss, scale_wrt_gas=False)

    def _scheduled(self) -> list[Optimizer]:
        return [] if "scheduler" in self.settings else self._own

    def _learning_rate(self) -> float:
        rate: float = self.engine.get_lr()[0]
        return rate

    def _apply(self, micro_batches: Sequence[Batch], losses: Tensor) -> Tensor:
        self._check_now(micro_batches, losses)
        if zero_stage(self.settings) == 0 and not is_half(self.settings):
            norm = self.strategy.clip_gradients(self.model, self.config.optim.clip_norm)
            self._check_now(micro_batches, losses, norm)
            self.engine.step()
            return norm
        self.engine.step()
        norm = torch.as_tensor(self.engine.get_global_grad_norm() or 0.0)
        if not is_half(self.settings):  # There an overflow is expected, and DeepSpeed lowers its loss scale.
            self._check_now(micro_batches, losses, norm)
        return norm

    def _check_now(self, micro_batches: Sequence[Batch], losses: Tensor, *norm: Tensor) -> None:
        """Check at every step, since DeepSpeed's step waits for the device in any case."""
        values = torch.stack([*losses, *(each.to(losses) for each in norm)])
        self.finite.note(Step(self.step_count, micro_batches, values))
        self.check_finite()

    def _repeat(self, step: Step) -> None:
        """Leave the gradients as they are: they are those of the step."""

    def _first_layer(self, batch: Batch) -> str | None:
        if zero_stage(self.settings) == 0:
            return super()._first_layer(batch)
        return first_non_finite(self.model, None)  # ZeRO ties parameters to its buffers: the model cannot be copied.

    def state_dict(self, *, part: bool = False) -> dict[str, Any]:
        """Return the logical state; where it cannot hold all, write DeepSpeed's own checkpoint beside it."""
        if not is_plain(self.settings) and self.folder is not None:
            self.engine.save_checkpoint(str(self.folder), tag=self._tag(self.step_count))
            self._delete_old(self.folder)
        return super().state_dict(part=part)

    def _delete_old(self, folder: Path) -> None:
        """Keep as many of DeepSpeed's checkpoints as of the run's."""
        if self.strategy.rank == 0:
            for old in sorted(folder.glob("step-*"))[:-KEPT]:
                shutil.rmtree(old, ignore_errors=True)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state, and where it does not hold all from DeepSpeed's own checkpoint, if that is trusted.

        Raises:
            ValueError: If the state belongs to another model or other settings, or DeepSpeed's checkpoint is missing or
                not trusted.
        """
        own = None if is_plain(self.settings) else self._trusted(state["step_count"])
        self.load_logical_state(state)
        if own is not None:
            self.engine.load_checkpoint(str(own.parent), tag=own.name)

    def load_logical_state(self, state: dict[str, Any]) -> None:
        """Go on from a logical state; DeepSpeed's own optimizer and ZeRO begin anew, and the schedule goes on."""
        super().load_logical_state(state)
        if "scheduler" in self.settings and self.step_count:
            self.engine.lr_scheduler.step(self.step_count - 1)

    def _trusted(self, step: int) -> Path:
        own = (self.folder or Path()) / self._tag(step)
        if not own.is_dir():
            raise ValueError(f"The run goes on from DeepSpeed's own checkpoint, and there is none at {own}.")
        if not self.config.deepspeed.trust_checkpoint:
            raise ValueError(
                f"The run goes on from DeepSpeed's own checkpoint, {own}. That is a pickle: loading it runs the code "
                "in it. If you wrote it yourself, say `deepspeed.trust_checkpoint=True`."
            )
        return own

    def _tag(self, step: int) -> str:
        return f"step-{step:08d}"

    def weights(self) -> dict[str, Any]:
        """Return the state of the model under our names, which ZeRO 3 puts together first."""
        if zero_stage(self.settings) < 3:
            return plain_state(self.model)
        with require("deepspeed", "deepspeed").zero.GatheredParameters(list(self.model.parameters())):
            return {name: value.clone() for name, value in plain_state(self.model).items()}

    def load_weights(self, weights: dict[str, Any]) -> None:
        """Load the state of the model, where DeepSpeed's own checkpoint does not."""
        if is_plain(self.settings):  # Otherwise they come with DeepSpeed's own checkpoint.
            super().load_weights(weights)

    def fixed_settings(self) -> dict[str, Any]:
        """Return what decides the state, of which DeepSpeed's own checkpoint holds more."""
        if is_plain(self.settings):
            return super().fixed_settings()
        sizes = {"processes": self.strategy.world_size, "ep_size": self.config.parallel.ep_size}
        return {**super().fixed_settings(), "zero_stage": zero_stage(self.settings), **sizes}


def start_deepspeed(device: torch.device) -> Any:
    """Import DeepSpeed for a device, and have it use the processes of torch's default group, or be one alone."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))
    deepspeed = require("deepspeed", "deepspeed")
    # Shared memory is for inference; without a compiler, which it needs, DeepSpeed would not start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
