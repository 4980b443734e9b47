"""The settings of a run, as frozen dataclasses; `config_file` writes them beside the run and reads them back."""

from dataclasses import field
from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt

from gatewright.data import BatchConfig
from gatewright.models import MixtureConfig
from gatewright.settings import settings
from gatewright.train.tracking.base import TrackingConfig

EngineName = Literal["torch", "deepspeed"]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Precision = Literal["float32", "bfloat16", "float16"]


@settings("optim")
class OptimConfig:
    """Settings of the optimizer and of the learning rate.

    Args:
        name: ``"adamw"``; ``"sgd"``, with Nesterov's momentum; or ``"muon"``, for the matrices of linear layers and
            experts and the filters of convolutions, with AdamW for gates, embeddings, norms and biases.
        lr: Largest learning rate.
        adam_lr: Learning rate of the parameters that Muon leaves to AdamW; None takes `lr`.
        weight_decay: Weight decay of everything but biases and norms, which have none.
        momentum: Momentum coefficient of SGD and Muon.
        betas: Decay rates of AdamW's two moments.
        warmup_epochs: Epochs, or a part of one, in which the rate rises from 0.
        warmup: The rise: linear, or logarithmic as DeepSpeed's WarmupLR.
        schedule: The fall to 0 after warm-up: ``"cosine"``, ``"linear"``, or ``"constant"`` for none.
        clip_norm: Largest norm of all gradients together; None does not clip.
        accumulation_steps: Micro-batches per optimizer step.
        ema_decay: Decay per step of the averaged weights that are evaluated in place of the last; None keeps none.
        label_smoothing: Share of each label spread over all classes.
    """

    name: Literal["adamw", "sgd", "muon"] = "adamw"
    lr: PositiveFloat = 1e-3
    adam_lr: PositiveFloat | None = None
    weight_decay: NonNegativeFloat = 0.01
    momentum: Fraction = 0.9
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    warmup_epochs: NonNegativeFloat = 0.0
    warmup: Literal["linear", "log"] = "linear"
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    clip_norm: PositiveFloat | None = None
    accumulation_steps: PositiveInt = 1
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    label_smoothing: Fraction = 0.0


@settings("parallel")
class ParallelConfig:
    """Settings of the spread of a run over its processes.

    Args:
        ep_size: Processes that share the experts of a layer out among them; it divides the number of processes.
        shard: Whether every process keeps all dense parameters, or a shard of each (torch's FSDP2).
        balance: Whether balance statistics are the global batch's or each process's own.
        batch_norm: Whether BatchNorm has the statistics of all processes that hold its module, or each process's own.
        timeout: Seconds after which a process that does not hear from the others gives up.
        max_restarts: Number of times that processes are started again when one died, from the newest checkpoint.
    """

    ep_size: PositiveInt = 1
    shard: Literal["none", "fsdp"] = "none"
    balance: Literal["global", "local"] = "global"
    batch_norm: Literal["sync", "local"] = "sync"
    timeout: PositiveFloat = 600.0
    max_restarts: NonNegativeInt = 3


@settings("deepspeed")
class DeepSpeedConfig:
    """Settings of DeepSpeed's engine, beside the run's own.

    Args:
        config: DeepSpeed's own JSON file, handed to it as it is; None trains with the run's optimizer at ZeRO stage 0.
        trust_checkpoint: Whether to go on from DeepSpeed's own checkpoint, which holds what the run's cannot where ZeRO
            or DeepSpeed's optimizer is used. It is a pickle: loading it runs whatever code is in it.
    """

    config: str | None = None
    trust_checkpoint: bool = False


@settings()
class RunConfig:
    """Everything that makes a run what it is; the same config and seed give the same weights on CPU.

    Args:
        recipe: The recipe's name.
        task: Task that the network is trained for: a name in `gatewright.tasks.TASKS`.
        model: The network.
        data: The data.
        optim: The optimizer.
        tracking: Tracker of the run's metrics.
        parallel: Spread of the run over its processes.
        engine: Engine that takes the optimizer steps: ``"torch"``, or ``"deepspeed"``.
        deepspeed: Settings of DeepSpeed's engine.
        processes: Processes to start on this machine; under torchrun, srun or DeepSpeed's launcher leave it out.
        seed: The seed of initialisation, order, augmentation and routing noise.
        epochs: Passes over the training data.
        precision: ``"float32"``; ``"bfloat16"`` (autocast); ``"float16"`` (autocast with dynamic loss scale).
        device: ``"auto"`` takes a GPU where there is one; or a torch device such as ``"cpu"``.
        channels_last: Memory format of images and filters, where there are any.
        compile: Whether the network goes through `torch.compile`.
        cuda_graphs: Whether what the compiled network launches on a GPU is recorded as CUDA graphs and replayed, which
            is faster where the host cannot keep the GPU busy.
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
    engine: EngineName = "torch"
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    processes: PositiveInt = 1
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] = 0
    epochs: PositiveInt = 10
    precision: Precision = "float32"
    device: str = "auto"
    channels_last: bool = True
    compile: bool = False
    cuda_graphs: bool = False
    checkpoint_every: PositiveInt = 1
    checkpoint_every_steps: PositiveInt | None = None
    checkpoint_in_background: bool = False
    output: str | None = None
