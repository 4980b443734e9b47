"""What is refused before a run begins: `validate` is the one place where its settings are."""

import os
import shutil
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from gatewright.ops import choose_backend
from gatewright.tasks import task_named
from gatewright.train.checkpoint.resume import check_changes
from gatewright.train.config import DeepSpeedConfig, RunConfig
from gatewright.train.device import AUTOCAST_DTYPES
from gatewright.train.engines import engine_class
from gatewright.train.folder import check_output

COMPILERS = ("g++", "clang++")


def validate(config: RunConfig, world: int, device: torch.device) -> None:
    """Refuse settings that cannot be trained together, before anything is opened, loaded or started."""
    _check_task(config)
    _check_mixture(config)
    _check_backend(config, device)
    _check_processes(config, world)
    _check_engine(config, world, device)
    _check_precision(config, world, device)
    _check_shards(config)


def check_start(config: RunConfig, resume: bool) -> None:
    """Refuse folders that are not what they have to be, and a run that would end before it is what it is to be."""
    check_output(config, resume)
    task_named(config.task).check_data(config.data)
    if not resume:
        check_upcycling(config, 0)


def _check_task(config: RunConfig) -> None:
    task = task_named(config.task)
    if not isinstance(config.model, task.models) or not isinstance(config.data, task.data):
        models = ", ".join(kind.__name__ for kind in task.models)
        raise ValueError(
            f"The task {config.task} takes a model of {models} and data of {task.data.__name__}; got "
            f"{type(config.model).__name__} and {type(config.data).__name__}."
        )


def _check_mixture(config: RunConfig) -> None:
    """Build the mixture without memory: that refuses what does not fit, such as a top_k above the number of experts."""
    if not config.model.needs_engine:
        with torch.device("meta"):
            config.model.build_mixture(lambda: nn.Linear(1, 1), router_dim=1, item_shape=(1,))
    elif config.engine != config.model.layer:
        raise ValueError(
            f"A layer of another library is trained by that library's engine; got `model.layer` {config.model.layer!r} "
            f"and `engine` {config.engine!r}. Set `engine={config.model.layer}`, or `model.layer=gatewright`."
        )


def _check_backend(config: RunConfig, device: torch.device) -> None:
    """Refuse a back-end that cannot take this device and precision, before a batch is there to show it."""
    if config.model.backend is not None:
        dtype = AUTOCAST_DTYPES.get(config.precision, torch.float32)
        choose_backend(torch.empty(0, dtype=dtype, device=device), config.model.backend)


def _check_processes(config: RunConfig, world: int) -> None:
    """Refuse experts and batches that the processes cannot share out."""
    ep_size, num_experts = config.parallel.ep_size, config.model.num_experts
    if world % ep_size:
        fits = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
        raise ValueError(
            f"`parallel.ep_size` ({ep_size}) divides the number of processes ({world}): use {fits}, or start a "
            f"multiple of {ep_size} processes (`processes`)."
        )
    if 1 < num_experts < ep_size:
        raise ValueError(
            f"{num_experts} experts (`model.num_experts`) cannot be spread over {ep_size} processes: use "
            f"`parallel.ep_size` of at most {num_experts}, or at least {ep_size} experts."
        )
    if config.data.batch_size < world:
        raise ValueError(
            f"A batch of {config.data.batch_size} items (`data.batch_size`) leaves some of {world} processes without "
            f"any: use a batch of at least {world}."
        )


def _check_engine(config: RunConfig, world: int, device: torch.device) -> None:
    if config.engine != "deepspeed" and config.deepspeed != DeepSpeedConfig():
        raise ValueError(
            f"`deepspeed.config` and `deepspeed.trust_checkpoint` are for DeepSpeed's engine; got `engine` "
            f"{config.engine!r}. Set `engine=deepspeed`, or leave them out."
        )
    engine_class(config.engine).check(config, world, device)


def _check_precision(config: RunConfig, world: int, device: torch.device) -> None:
    if world > 1 and (config.compile or config.precision == "float16"):
        raise ValueError(
            f"Several processes train in float32 or bfloat16, and do not compile; got `precision` {config.precision!r} "
            f"and `compile` {config.compile}. Use `precision=bfloat16` with `compile=False`, or one process."
        )
    if config.cuda_graphs and not (config.compile and device.type == "cuda"):
        raise ValueError(
            f"`cuda_graphs=True` replays what `compile=True` made for a CUDA device; got `compile` {config.compile} "
            f"and `device` {device.type!r}. Set `compile=True` on a GPU, or leave `cuda_graphs` out."
        )
    compilers = (os.environ.get("CXX", COMPILERS[0]), *COMPILERS)
    if config.compile and device.type == "cpu" and not any(map(shutil.which, compilers)):
        raise ValueError(
            f"`compile=True` needs a C++ compiler on the CPU, and none of {', '.join(dict.fromkeys(compilers))} is "
            "here. Install one, name it in the environment variable CXX, or leave `compile=True` out."
        )


def _check_shards(config: RunConfig) -> None:
    if config.parallel.shard != "fsdp":
        return
    if config.optim.name == "muon" or config.optim.ema_decay is not None:
        raise ValueError(
            "`parallel.shard=fsdp` keeps a shard of each matrix, and Muon and averaging need whole ones; got "
            f"`optim.name` {config.optim.name!r} and `optim.ema_decay` {config.optim.ema_decay}. Use adamw or sgd "
            "without averaging, or `parallel.shard=none`."
        )


def check_upcycling(config: RunConfig, epoch: int) -> None:
    """Refuse to train, from an epoch on, a dense network that would never become the mixture that is asked for."""
    first = config.model.upcycle_epoch
    if config.model.num_experts > 1 and epoch < config.epochs <= first:
        raise ValueError(
            f"The run trains a dense network until epoch {first}, counted from 0, and a mixture of its copies from "
            f"there on, but it ends after {config.epochs} (`epochs`). Use `epochs={first + 1}` or more, a "
            f"`model.upcycle_epoch` below {config.epochs}, or `model.num_experts=1` for the dense twin."
        )


def tell_changes(config: RunConfig, saved: Mapping[str, Any], *, quiet: bool) -> list[str]:
    """Say which settings are not those that a run was trained with so far, unless it is quiet, and return that."""
    check_upcycling(config, saved["position"]["epoch"])
    said = check_changes(config, saved)
    for sentence in () if quiet else said:
        print(f"resumed: {sentence}", file=sys.stderr)
    return said
