"""Saving a run: every process its own part, all of them one checkpoint; at once, or beside the training."""

import threading
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor, nn

from gatewright.parallel import Rows
from gatewright.train.checkpoint.format import save_checkpoint, save_part
from gatewright.train.strategies.base import Processes


class Saver:
    """Writes the checkpoints of a run; every process has one and saves with the others.

    Args:
        folder: Where they go; one that all processes share.
        processes: Those of the run.
        in_background: Copy the state and write it in a thread, while training goes on; the next checkpoint and the end
            of the run wait for it.
    """

    def __init__(self, folder: Path, processes: Processes, *, in_background: bool = False) -> None:
        self.folder, self.processes, self.in_background = folder, processes, in_background
        if in_background:
            processes.work_apart()
        self._writing: threading.Thread | None = None
        self._failure: Exception | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wait for what is being written; say that it failed where nothing else went wrong."""
        try:
            self.wait()
        except Exception:
            if error is None:
                raise

    def save(self, state: dict[str, Any], model: nn.Module, step: int) -> None:
        """Write the part of a state that is this process's; every process calls it.

        Raises:
            OSError: If this checkpoint could not be written here or elsewhere; in the background, the one before it.
        """
        self.wait()
        place = self.processes.number_of_part(model)
        if not self.in_background:
            self._write(state, place, step)
            return
        self._writing = threading.Thread(target=self._try, args=(copied(state), place, step), name="checkpoint")
        self._writing.start()

    def wait(self) -> None:
        """Wait for the checkpoint that is being written.

        Raises:
            OSError: If it could not be.
        """
        if self._writing is not None:
            self._writing.join()
        self._writing, failure, self._failure = None, self._failure, None
        if failure is not None:
            raise failure

    def _try(self, state: dict[str, Any], place: tuple[int | None, int], step: int) -> None:
        try:
            self._write(state, place, step)
        except Exception as error:  # Such as that another process is gone: told when training asks.
            self._failure = error

    def _write(self, state: dict[str, Any], place: tuple[int | None, int], step: int) -> None:
        number, parts = place
        failure: OSError | None = None
        for first in (False, True):  # The first process's file makes the parts a checkpoint: it comes last.
            try:
                if first and number == 0:
                    save_checkpoint(state, self.folder, step, parts=parts)
                elif not first and number:
                    save_part(state, self.folder, step, number=number, parts=parts)
            except OSError as error:
                failure = error
            # No process goes on, or dies of a signal, before the state is safe; none waits for one that could not save.
            if self.processes.agree(None if failure is None else 1, apart=self.in_background) is not None:
                raise failure or OSError("Another process could not write the checkpoint: its words say why.")


def copied(state: Any) -> Any:
    """Copy the tensors of a state, so that training may go on changing them."""
    if isinstance(state, Tensor):
        return state.detach().to("cpu", copy=True)
    if isinstance(state, Rows):
        return Rows(*map(copied, state.runs))
    if isinstance(state, dict):
        return {key: copied(value) for key, value in state.items()}
    return [copied(value) for value in state] if isinstance(state, list | tuple) else state
