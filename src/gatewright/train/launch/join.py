"""Joining the processes that a launcher started, if they can share the run out."""

import contextlib
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta

import torch
import torch.distributed as dist

from gatewright.parallel import expert_mesh
from gatewright.train.config import RunConfig
from gatewright.train.engines import engine_class
from gatewright.train.launch.watchdog import LostProcess, watched
from gatewright.train.strategies.ddp import DDPStrategy
from gatewright.train.strategies.fsdp import FSDPStrategy
from gatewright.train.strategies.single import ALONE, Strategy

SLURM = {"RANK": "SLURM_PROCID", "WORLD_SIZE": "SLURM_NTASKS", "LOCAL_RANK": "SLURM_LOCALID"}


@contextlib.contextmanager
def join_processes(config: RunConfig, environment: Mapping[str, str] = os.environ) -> Iterator[Strategy]:
    """Join the processes that a launcher started: torchrun, deepspeed or srun; or be one alone.

    Raises:
        ValueError: If their number is not what the run asks for.
        LostProcess: If one is gone, hangs or cannot be reached.
    """
    world, local_rank = place_in_run(config, environment)
    engine = engine_class(config.engine)
    if world == 1 and not engine.needs_process_group:
        yield ALONE
        return
    os.environ.update({name: str(place) for name, place in _places(environment).items()})
    on_gpu = config.device != "cpu" and torch.cuda.is_available()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"  # What processes tell each other about is on the CPU.
    store = dist.HashStore() if world == 1 else None  # type: ignore[attr-defined]
    place = (0, 1) if world == 1 else (-1, -1)  # Several processes find theirs in the environment.
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
            mesh, local_rank=local_rank, parallel=config.parallel, background=config.checkpoint_in_background
        )
        with watched(several, config.parallel.timeout):
            yield several
    finally:
        engine.leave()


def place_in_run(config: RunConfig, environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Return how many processes were started, which is what the run asks for, and this one's number on its machine."""
    places = _places(environment)
    world = places.get("WORLD_SIZE", 1)
    if config.processes not in (1, world):
        raise ValueError(
            f"The run asks for {config.processes} processes (`processes`, or what it began with) and {world} were "
            f"started. Start {config.processes}, or set `processes={world}`."
        )
    return world, places.get("LOCAL_RANK", 0)


def _places(environment: Mapping[str, str]) -> dict[str, int]:
    """Read this process's place from torchrun's variables, or else from Slurm's."""
    if "RANK" not in environment and int(environment.get("SLURM_NTASKS", 1)) > 1:
        return {name: int(environment[theirs]) for name, theirs in SLURM.items() if theirs in environment}
    return {name: int(environment[name]) for name in SLURM if name in environment}
