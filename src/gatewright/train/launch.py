"""Starting the processes of a run on this machine, and starting them again where one dies."""

import os
import sys
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from gatewright.train.config import RunConfig
from gatewright.train.folder import CONFIG
from gatewright.train.join import check_fit
from gatewright.train.signals import Interrupted

LAUNCHED = ("RANK", "SLURM_PROCID")


def needs_launch(config: RunConfig, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is to start others, instead of being one that a launcher started."""
    return config.processes > 1 and not any(name in environment for name in LAUNCHED)


def launch(config: RunConfig, words: Sequence[str]) -> None:
    """Run ``gatewright train`` with these words on every process, by torch's elastic launcher.

    A process that dies takes the others with it; all are started again from the newest checkpoint.

    Raises:
        ValueError: If the processes cannot share the run out.
        ChildProcessError: If processes died more often than ``parallel.max_restarts``.
        Interrupted: If a signal stopped the run; its processes saved it first.
    """
    check_fit(config, config.processes)
    threads = max(1, (os.cpu_count() or 1) // config.processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    settings = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=config.processes,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=config.parallel.max_restarts,
        monitor_interval=0.2,
    )
    try:
        elastic_launch(settings, sys.executable)("-m", "gatewright", "train", *words)
    except SignalException as stop:
        raise Interrupted("Stopped, and saved: go on with --resume.", int(stop.sigval)) from stop
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise ChildProcessError(
            f"Process {rank} of {config.processes} ended with {_reason(failure.exitcode)}, after "
            f"{config.parallel.max_restarts} restarts (--parallel.max-restarts); its own words are above. Go on from "
            f"the newest checkpoint with --resume --output {config.output}."
        ) from error


def was_restarted(output: Path, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether the launcher started this process again, with a run to go on with."""
    return int(environment.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and (output / CONFIG).is_file()


def _reason(exit_code: int) -> str:
    return f"signal {-exit_code}" if exit_code < 0 else f"exit status {exit_code}"
