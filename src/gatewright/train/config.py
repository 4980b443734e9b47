"""The settings of a run, as frozen dataclasses; `config_file` writes them beside the run and reads them back."""

import math
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

import torch
from torch import nn

from gatewright.data import BatchConfig
from gatewright.models import MixtureConfig
from gatewright.tasks import task_named
from gatewright.train.tracking.base import TrackingConfig

Precision = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """How weights change.

    Args:
        name: ``"adamw"``; ``"sgd"``, with Nesterov's momentum; or ``"muon"``, for the matrices of linear layers and
            experts and the filters of convolutions, with AdamW for gates, embeddings, norms and biases.
        lr: Largest learning rate.
        adam_lr: Learning rate of the parameters that Muon leaves to AdamW; None takes `lr`.
        weight_decay: Weight decay of everything but biases and norms, which have none.
        momentum: Of SGD and Muon.
        betas: Of AdamW.
        warmup_epochs: Epochs, or a part of one, in which the rate rises from 0.
        warmup: The rise: linear, or logarithmic as DeepSpeed's WarmupLR.
        schedule: The fall to 0 after warm-up: ``"cosine"``, ``"linear"``, or ``"constant"`` for none.
        clip_norm: Largest norm of all gradients together; None does not clip.
        accumulation_steps: Micro-batches per optimizer step.
        ema_decay: Decay per step of the averaged weights that are evaluated in place of the last; None keeps none.
        label_smoothing: Share of each label spread over all classes.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: float = 1e-3
    adam_lr: float | None = None
    weight_decay: float = 0.01
    momentum: float = 0.9
    betas: tuple[float, float] = (0.9, 0.999)
    warmup_epochs: float = 0.0
    warmup: Literal["linear", "log"] = "linear"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip_norm: float | None = None
    accumulation_steps: int = 1
    ema_decay: float | None = None
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        _refuse_unknown_choices(self)
        if not 0 < self.lr < math.inf or not (self.adam_lr is None or 0 < self.adam_lr < math.inf):
            raise ValueError(f"lr is above 0, and so is adam_lr, or None for the same; got {self.lr}, {self.adam_lr}.")
        if self.accumulation_steps < 1:
            raise ValueError(f"accumulation_steps is at least 1, for no accumulation; got {self.accumulation_steps}.")
        if not all(0 <= share < 1 for share in (self.momentum, *self.betas)) or not 0 <= self.weight_decay < math.inf:
            raise ValueError(
                f"momentum and betas lie in [0, 1) and weight_decay is not negative; got {self.momentum}, {self.betas} "
                f"and {self.weight_decay}."
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise ValueError(f"clip_norm is above 0, or None for no clipping; got {self.clip_norm}.")
        if self.ema_decay is not None and not 0 < self.ema_decay < 1:
            raise ValueError(f"ema_decay lies between 0 and 1, or is None for no averaging; got {self.ema_decay}.")
        if not 0 <= self.label_smoothing < 1 or not 0 <= self.warmup_epochs < math.inf:
            raise ValueError(
                f"label_smoothing lies in [0, 1) and warmup_epochs is finite and not negative; got "
                f"{self.label_smoothing} and {self.warmup_epochs}."
            )


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How a run is spread over its processes.

    Args:
        ep_size: Processes that share the experts of a layer out among them; it divides the number of processes.
        shard: Whether every process keeps all dense parameters, or a shard of each (torch's FSDP2).
        balance: Whether balance statistics are the global batch's or each process's own.
        batch_norm: Whether BatchNorm has the statistics of all processes that hold its module, or each process's own.
        timeout: Seconds after which a process that does not hear from the others gives up.
        max_restarts: How often processes that died are started again, from the newest checkpoint.
    """

    ep_size: int = 1
    shard: Literal["none", "fsdp"] = "none"
    balance: Literal["global", "local"] = "global"
    batch_norm: Literal["sync", "local"] = "sync"
    timeout: float = 600.0
    max_restarts: int = 3

    def __post_init__(self) -> None:
        if not 0 < self.timeout < math.inf or self.max_restarts < 0:
            raise ValueError(
                f"timeout is finite and above 0 and max_restarts not negative; got {self.timeout} and "
                f"{self.max_restarts}."
            )


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """What `engine="deepspeed"` is told beside the run's own settings.

    Args:
        config: DeepSpeed's own JSON file, handed to it as it is; None trains with the run's optimizer at ZeRO stage 0.
        trust_checkpoint: Whether to go on from DeepSpeed's own checkpoint, which holds what the run's cannot where ZeRO
            or DeepSpeed's optimizer is used. It is a pickle: loading it runs whatever code is in it.
    """

    config: str | None = None
    trust_checkpoint: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that makes a run what it is; the same config and seed give the same weights on CPU.

    Args:
        recipe: The recipe's name.
        task: What the network is trained for: a name in `gatewright.tasks.TASKS`.
        model: The network.
        data: The data.
        optim: The optimizer.
        tracking: Where metrics go.
        parallel: How the run is spread over its processes.
        engine: Who changes the weights: ``"torch"``, or ``"deepspeed"``.
        deepspeed: What DeepSpeed is told.
        processes: How many to start on this machine; under torchrun, srun or DeepSpeed's launcher leave it out.
        seed: Of initialisation, order, augmentation and routing noise.
        epochs: Passes over the training data.
        precision: ``"float32"``; ``"bfloat16"`` (autocast); ``"float16"`` (autocast with dynamic loss scale).
        device: ``"auto"`` takes a GPU where there is one; or a torch device such as ``"cpu"``.
        channels_last: Memory format of images and filters, where there are any.
        compile: Whether the network goes through `torch.compile`.
        checkpoint_every: Epochs between checkpoints.
        checkpoint_every_steps: Optimizer steps between checkpoints, besides those; None for none.
        checkpoint_in_background: Whether training goes on while a copy of the state is written.
        output: The run's folder; None makes one under ``runs``.
    """

    recipe: str
    task: str = "classification"
    model: MixtureConfig
    data: BatchConfig
    optim: OptimConfig = field(default_factory=OptimConfig)
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    engine: Literal["torch", "deepspeed"] = "torch"
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    processes: int = 1
    seed: int = 0
    epochs: int = 10
    precision: Precision = "float32"
    device: str = "auto"
    channels_last: bool = True
    compile: bool = False
    checkpoint_every: int = 1
    checkpoint_every_steps: int | None = None
    checkpoint_in_background: bool = False
    output: str | None = None

    def __post_init__(self) -> None:
        _refuse_unknown_choices(self)
        self._check_task()
        _refuse_unknown_choices(self.model)
        _refuse_unknown_choices(self.parallel)
        if min(self.epochs, self.checkpoint_every, self.processes) < 1:
            raise ValueError(
                f"epochs, checkpoint_every and processes are at least 1; got {self.epochs}, {self.checkpoint_every} "
                f"and {self.processes}."
            )
        if self.engine != "deepspeed" and self.deepspeed != DeepSpeedConfig():
            raise ValueError("--deepspeed.config and --deepspeed.trust-checkpoint go with --engine deepspeed; add it.")
        if self.checkpoint_every_steps is not None and self.checkpoint_every_steps < 1:
            raise ValueError(f"checkpoint_every_steps is at least 1, or None; got {self.checkpoint_every_steps}.")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed is an integer of 64 bits; got {self.seed}.")
        if self.model.upcycle_epoch < 0:
            raise ValueError(f"upcycle_epoch is an epoch, counted from 0; got {self.model.upcycle_epoch}.")
        if self.model.layer == "deepspeed" and self.model.num_experts > 1:
            self._check_deepspeeds_layer()
            return
        with torch.device("meta"):  # Refuses what does not fit, such as top_k above num_experts, before any work.
            self.model.build_mixture(lambda: nn.Linear(1, 1), router_dim=1, item_shape=(1,))

    def _check_task(self) -> None:
        task = task_named(self.task)
        if not isinstance(self.model, task.models) or not isinstance(self.data, task.data):
            models = ", ".join(kind.__name__ for kind in task.models)
            raise ValueError(
                f"The task {self.task} takes a model of {models} and data of {task.data.__name__}; got "
                f"{type(self.model).__name__} and {type(self.data).__name__}."
            )

    def _check_deepspeeds_layer(self) -> None:
        model = self.model
        plain = model.router == "top-k" and not model.expert_dropout and not model.upcycle_epoch
        if self.engine != "deepspeed" or not plain or self.parallel.ep_size > 1:
            raise ValueError(
                "--model.layer deepspeed is DeepSpeed's layer with its own gate: it wants --engine deepspeed, "
                "--model.router top-k, --parallel.ep-size 1 (its spread experts are not in a run's checkpoints), and "
                f"neither expert dropout nor upcycle_epoch; got engine {self.engine}, router {model.router}, ep size "
                f"{self.parallel.ep_size}, expert dropout {model.expert_dropout}, upcycle_epoch {model.upcycle_epoch}."
            )


def _refuse_unknown_choices(config: Any) -> None:
    """Compare every setting that is one of a few words with these words."""
    for item in fields(config):
        choices, value = get_args(item.type), getattr(config, item.name)
        if get_origin(item.type) is Literal and value not in choices:
            raise ValueError(f"{item.name} is one of {', '.join(map(repr, choices))}; got {value!r}.")
