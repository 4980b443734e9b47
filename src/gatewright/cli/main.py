"""The entry point: one command, its exit status, and its errors as one sentence each."""

import os
import sys
from collections.abc import Sequence

from gatewright import __version__
from gatewright.names import known

USAGE = f"""\
gatewright {__version__}: train mixtures of experts, and see what the experts do

  gatewright train RECIPE [--output RUN] [--epochs N] [--seed N] ...   train; RECIPE --help lists every setting
  gatewright train RECIPE --output RUN --resume                        go on with a run that was stopped
  gatewright evaluate RUN [--flip] [--data.path FOLDER]                evaluate a run on the whole test set
  gatewright predict RUN IMAGE [IMAGE ...]                             classify image files, and name their experts
  gatewright export RUN FILE.safetensors                               the evaluated model's weights, as one file
  gatewright plan [RECIPE] [--processes N] [--parallel.ep-size N] ...  predict memory, bytes and time per process
  gatewright list                                                      recipes, data sets, routers, dispatchers, losses
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    That is 2 for bad input, 3 if other processes were lost, 4 if training diverged, and 128 + n after signal n.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in words if not word.startswith("--local_rank=")]  # DeepSpeed's launcher appends it.
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    try:
        return _run(words[0], words[1:])
    # What a person can mend is one sentence; anything else is our fault and keeps its traceback.
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 130


def _run(command: str, words: list[str]) -> int:
    # Imported here, so that help needs no extra, and a missing one is a sentence.
    try:
        from gatewright.cli.commands import COMMANDS
        from gatewright.train import Interrupted, TrainingDiverged
        from gatewright.train.agent import DIVERGED
        from gatewright.train.heartbeat import LOST_PROCESS, LostProcess
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'gatewright[train]'") from error
    try:
        COMMANDS[known(command, COMMANDS, "command")](words)
    except Interrupted as stop:
        if int(os.environ.get("RANK", 0)) == 0:  # One process says it for all.
            print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    except (TrainingDiverged, LostProcess) as error:
        print(f"error: {error}", file=sys.stderr)
        return LOST_PROCESS if isinstance(error, LostProcess) else DIVERGED
    return 0
