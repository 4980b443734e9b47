"""Saving a run: every process its own part, all of them one checkpoint; at once, or beside the training."""

from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import nn

from gatewright.parallel import copied, part_number
from gatewright.train.checkpoint.format import save_checkpoint
from gatewright.train.strategies.single import Strategy, largest


class Saver:
    """Writes the checkpoints of a run; every process has one and saves with the others.

    Args:
        folder: Folder of the checkpoints, which all processes share.
        strategy: Strategy of the run, made with `background` where a thread writes.
        in_background: Copy the state and write it in a thread, while training goes on; the next checkpoint and the end
            of the run wait for it.
    """

    def __init__(self, folder: Path, strategy: Strategy, *, in_background: bool = False) -> None:
        self.folder, self.strategy, self.in_background = folder, strategy, in_background
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._writing: Future[None] | None = None

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        """Wait for what is being written; say that it failed where nothing else went wrong."""
        self._thread.shutdown()
        if error is None:
            self.wait()

    def save(self, state: dict[str, Any], model: nn.Module, step: int) -> None:
        """Write the part of a state that is this process's; every process calls it.

        Raises:
            OSError: If this checkpoint could not be written here or elsewhere; in the background, the one before it.
        """
        self.wait()
        place = part_number(model, self.strategy.mesh)
        if self.in_background:
            self._writing = self._thread.submit(self._write, copied(state), place, step)
        else:
            self._write(state, place, step)

    def wait(self) -> None:
        """Wait for the checkpoint that is being written."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    def _write(self, state: dict[str, Any], place: tuple[int | None, int], step: int) -> None:
        number, parts = place
        for turn in (number != 0, number == 0):  # Part 0 makes the parts a checkpoint: it comes last.
            failure: OSError | None = None
            try:
                if turn and number is not None:
                    save_checkpoint(state, self.folder, step, number=number, parts=parts)
            except OSError as error:
                failure = error
            # No process goes on, or dies of a signal, before the state is safe; none waits for one that could not save.
            if largest(self.strategy, None if failure is None else 1, background=self.in_background) is not None:
                raise failure or OSError("Another process could not write the checkpoint: its words say why.")
