"""Torch's elastic agent, which also says which process ended and why, and when starting again is of no use."""

import signal
import sys
from collections.abc import Mapping

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

FOR_A_PERSON, DIVERGED = 2, 4
"""Exit statuses of a process that said what a person must mend, or that diverged: it would only do so again."""


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


def first_failure(failures: Mapping[int, ProcessFailure]) -> tuple[int, ProcessFailure]:
    """Return the process that ended by itself; those that the agent then stopped come after it."""
    return next(iter(failures.items()))


def sentence(failures: Mapping[int, ProcessFailure]) -> str:
    """Say which process ended, and with what."""
    rank, failure = first_failure(failures)
    code = failure.exitcode
    how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    return f"Process {rank} (pid {failure.pid}) {how}"
