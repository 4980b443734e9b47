"""Starting the processes of a run on this machine, by torch's elastic agent, and again where one dies."""

import logging
import os
import signal
import sys
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.api import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from gatewright.train.checkpoint.format import newest_checkpoint
from gatewright.train.config import RunConfig
from gatewright.train.folder import CONFIG, own_folder, resume_command
from gatewright.train.launch.signals import Interrupted
from gatewright.train.preview import check_run

FOR_A_PERSON, DIVERGED = 2, 4
"""Exit statuses of a process that said what a person must mend, or that diverged: it would only do so again."""
TORCHS_WORDS = "torch.distributed.elastic.multiprocessing.api"
"""The logger of what `Agent` says in a sentence: that a process failed, and that torch stops the others."""


class Agent(LocalElasticAgent):
    """Starts the processes of this machine, and starts all again where one dies."""

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        result: RunResult = super()._monitor_workers(worker_group)
        if result.state is WorkerState.FAILED:
            if first_failure(result.failures)[1].exitcode in (FOR_A_PERSON, DIVERGED):
                self._remaining_restarts = 0
            if self._remaining_restarts:
                most = worker_group.spec.max_restarts
                number = most - self._remaining_restarts + 1
                print(
                    f"{sentence(result.failures)}. All start again from the newest checkpoint: restart {number} of "
                    f"{most}.",
                    file=sys.stderr,
                    flush=True,
                )
        return result


def needs_launch(config: RunConfig, environment: Mapping[str, str] = os.environ) -> bool:
    """Whether this process is to start others, instead of being one that a launcher started."""
    launched = "RANK" in environment or int(environment.get("SLURM_NTASKS", 1)) > 1  # A shell of Slurm's is one task.
    return config.processes > 1 and not launched


def launch(config: RunConfig, words: Sequence[str], *, resume: bool = False) -> None:
    """Run ``gatewright train`` with these words, typed after ``train``, on every process, by torch's elastic launcher.

    A process that dies takes the others with it; all are started again from the newest checkpoint.

    Raises:
        OSError: If the folder of the run, or that of its data, is not what it has to be.
        ValueError: If the settings, the data or the run to resume do not fit together.
        ChildProcessError: If processes died more often than ``parallel.max_restarts``.
        Interrupted: If a signal stopped the run; its processes saved it first if they were training.
        SystemExit: If a process said what a person must mend, or diverged.
    """
    check_run(config, resume=resume, quiet=True)  # The first process says what is changed.
    with own_folder(config, resume) as output:  # The first process takes it over.
        config = replace(config, output=str(output))
    threads = max(1, (os.cpu_count() or 1) // config.processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # Each start has a store of its own: in the launcher's, processes started again find the addresses of the dead.
    # https://github.com/pytorch/pytorch/issues/135712
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    logging.getLogger(TORCHS_WORDS).setLevel(logging.CRITICAL)
    parameters = RendezvousParameters("c10d", "localhost:0", uuid.uuid4().hex, 1, 1)
    spec = WorkerSpec(
        role="train",
        local_world_size=config.processes,
        entrypoint=sys.executable,
        args=("-m", "gatewright_command", "train", *words, "--output", config.output),
        rdzv_handler=get_rendezvous_handler(parameters),
        max_restarts=config.parallel.max_restarts,
        monitor_interval=0.2,
    )
    try:
        result = Agent(spec, DefaultLogsSpecs()).run()
    except SignalException as stop:
        raise Interrupted(how_to_go_on(config), int(stop.sigval)) from stop
    finally:
        spec.rdzv_handler.shutdown()
    if not result.is_failed():
        return
    if (status := first_failure(result.failures)[1].exitcode) in (FOR_A_PERSON, DIVERGED):
        sys.exit(status)
    raise ChildProcessError(
        f"{sentence(result.failures)}, after {config.parallel.max_restarts} restarts (`parallel.max_restarts`); its "
        f"own words are above. Go on from the newest checkpoint with `resume=True` and `output={config.output}`."
    )


def how_to_go_on(config: RunConfig) -> str:
    """Say what there is of a run that was stopped, which may not have saved anything yet."""
    output = Path(config.output or "")
    if not (output / CONFIG).is_file():
        return "Stopped before training began, and nothing was saved. Give the same command again."
    newest = newest_checkpoint(output / "checkpoints")
    saved = f"the newest checkpoint is {newest.name}" if newest else "nothing was saved yet"
    return f"Stopped, and {saved}. Go on with: {resume_command(config, output)}"


def was_restarted(output: Path) -> bool:
    """Whether the launcher started this process again, with a run to go on with."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0 and (output / CONFIG).is_file()


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the process that ended by itself; those that the agent then stopped come after it."""
    return next(iter(failures.items()))


def sentence(failures: Mapping[int, ProcessFailure]) -> str:
    """Say which process ended, and with what."""
    rank, failure = first_failure(failures)
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    return f"Process {rank} (pid {failure.pid}) {how}"
