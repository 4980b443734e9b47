"""Joining the processes that a launcher started, if they can share the run out."""

import contextlib
import os
import sys
from collections.abc import Iterator, Mapping
from datetime import timedelta
from importlib import import_module

import torch
import torch.distributed as dist

from gatewright.parallel import expert_mesh
from gatewright.train.config import RunConfig
from gatewright.train.launch.watchdog import LostProcess, watched
from gatewright.train.strategies.ddp import DDPStrategy
from gatewright.train.strategies.fsdp import FSDPStrategy
from gatewright.train.strategies.single import ALONE, Strategy

SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@contextlib.contextmanager
def join_processes(config: RunConfig, environment: Mapping[str, str] = os.environ) -> Iterator[Strategy]:
    """Join the processes that a launcher started: torchrun, DeepSpeed's launcher or srun; or be one alone.

    Raises:
        ValueError: If their number is not what the run asks for.
        LostProcess: If one is gone, hangs or cannot be reached.
    """
    places = _places(environment)
    world = places.get("WORLD_SIZE", 1)
    if config.processes not in (1, world):
        raise ValueError(
            f"The run asks for {config.processes} processes (--processes, or what it began with) and {world} were "
            f"started. Start {config.processes}, or say --processes {world}."
        )
    check_fit(config, world)
    if world == 1 and config.engine == "torch":
        yield ALONE
        return
    os.environ.update({name: str(place) for name, place in places.items()})
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # What processes tell each other about is on the CPU.
    store = dist.HashStore() if world == 1 else None  # type: ignore[attr-defined]
    place = (0, 1) if world == 1 else (-1, -1)  # Several processes find theirs in the environment.
    check_devices(config, places.get("LOCAL_RANK", 0), on_gpu)
    timeout = timedelta(seconds=config.parallel.timeout)
    try:
        dist.init_process_group(backend, timeout=timeout, store=store, rank=place[0], world_size=place[1])
    except dist.DistError as error:
        reason = str(error).splitlines()[0]
        raise LostProcess(f"Not all of {world} processes joined within {timeout.seconds} s: {reason}") from error
    try:
        if world == 1:
            yield ALONE
            return
        device_type = "cuda" if on_gpu else "cpu"
        mesh = expert_mesh(config.parallel.ep_size, device_type, timeout=config.parallel.timeout)
        make = FSDPStrategy if config.parallel.shard == "fsdp" else DDPStrategy
        several = make(
            mesh,
            local_rank=places.get("LOCAL_RANK", 0),
            parallel=config.parallel,
            background=config.checkpoint_in_background,
        )
        with watched(several, config.parallel.timeout):
            yield several
    finally:
        _leave()


def _leave() -> None:
    """Leave the processes; where DeepSpeed was with them, by its own door, so that it forgets its groups."""
    theirs = sys.modules.get("deepspeed.comm")
    if theirs is not None and theirs.is_initialized():
        theirs.destroy_process_group()
    else:
        dist.destroy_process_group()


def check_devices(config: RunConfig, local_rank: int, on_gpu: bool) -> None:
    """Refuse more processes on a machine than it has GPUs.

    Raises:
        ValueError: The sentence holds their number.
    """
    if on_gpu and ":" in config.device:
        raise ValueError(
            f"Each of several processes has a GPU of its own; got --device {config.device}. Leave it out, or say cuda."
        )
    if on_gpu and local_rank >= torch.cuda.device_count():
        count = torch.cuda.device_count()
        raise ValueError(
            f"This machine has {count} GPUs and was to run at least {local_rank + 1} processes, each on its own. Start "
            f"{count} here, or use --device cpu."
        )


def check_fit(config: RunConfig, world: int) -> None:
    """Refuse a run that its processes cannot share out, before any data are loaded.

    Raises:
        ValueError: The sentence holds the numbers and the nearest ones that fit.
    """
    ep_size, num_experts = config.parallel.ep_size, config.model.num_experts
    if ep_size < 1 or world % ep_size:
        fits = ", ".join(str(size) for size in range(1, world + 1) if world % size == 0)
        raise ValueError(
            f"--parallel.ep-size ({ep_size}) divides the number of processes ({world}): use {fits}, or start a "
            f"multiple of {ep_size} processes (--processes)."
        )
    if 1 < num_experts < ep_size:
        raise ValueError(
            f"{num_experts} experts (--model.num-experts) cannot be spread over {ep_size} processes: use "
            f"--parallel.ep-size of at most {num_experts}, or at least {ep_size} experts."
        )
    if config.data.batch_size < world:
        raise ValueError(
            f"A batch of {config.data.batch_size} items (--data.batch-size) leaves some of {world} processes without "
            f"any: use a batch of at least {world}."
        )
    if config.engine == "deepspeed":
        settings = import_module("gatewright.integrations.deepspeed.settings")
        settings.deepspeed_settings(config, world, on_cpu=config.device == "cpu")
    if world > 1 and (config.compile or config.precision == "float16"):
        raise ValueError(
            "Several processes train in float32 or bfloat16, and without --compile. Use --precision bfloat16, or one "
            "process."
        )
    if config.parallel.shard == "fsdp":
        _check_shards(config)


def _check_shards(config: RunConfig) -> None:
    if config.optim.name == "muon" or config.optim.ema_decay is not None:
        raise ValueError(
            "--parallel.shard fsdp keeps a shard of each matrix, and Muon and averaging (--optim.ema-decay) want whole "
            "ones. Use adamw or sgd without averaging, or --parallel.shard none."
        )


def _places(environment: Mapping[str, str]) -> dict[str, int]:
    """Read this process's place from torchrun's variables, or else from Slurm's."""
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return {name: int(environment[theirs]) for name, theirs in SLURM.items() if theirs in environment}
    return {name: int(environment[name]) for name in SLURM if name in environment}
