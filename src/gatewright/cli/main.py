"""The entry point: one command, its exit status, and its errors as one sentence each."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence

from gatewright import __version__
from gatewright.names import known

USAGE = f"""\
gatewright {__version__}: train mixtures of experts, and see what the experts do

  gatewright train RECIPE [--output RUN] [--epochs N] [--seed N] ...   train; RECIPE --help lists every setting
  gatewright train RECIPE --output RUN --resume                        go on with a run that was stopped
  gatewright evaluate RUN [--flip] [--data.path FOLDER]                evaluate a run on the whole test set
  gatewright predict RUN FILE-OR-FOLDER ... [--top N] [--json]         classify images; the bits per byte of texts
  gatewright generate RUN [--prompt TEXT] [--length N] ...             have a language model write on
  gatewright serve RUN [--port N]                                      a local page to try a run's model on
  gatewright report RUN                                                make the run's pictures and page anew
  gatewright compare RUN ... --to RUN ...                              a mixture beside its dense twin, and how surely
  gatewright study [NAME] [--budget TIER] [--jobs N] ...               train the runs of a study, and write its page
  gatewright prune RUN [--num-experts N] [--keep N N ...] ...          a finished run with fewer experts, as a new run
  gatewright merge RUN --num-experts N ...                             the same, with the most alike experts merged
  gatewright grow RUN --num-experts N [--top-k N] [--noise N] ...      the same, with more experts: copies
  gatewright densify RUN ...                                           the same, with the mean of the experts, dense
  gatewright export RUN FILE.safetensors                               the evaluated model's weights, as one file
  gatewright plan [RECIPE] [--processes N] [--parallel.ep-size N] ...  predict memory, bytes and time per process
  gatewright completion SHELL                                          have bash, zsh or fish complete all of this
  gatewright list                                                      recipes, data sets, routers, dispatchers, losses
"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status.

    That is 2 for bad input, 3 if other processes were lost, 4 if training diverged, and 128 + n after signal n.
    """
    words = list(sys.argv[1:] if arguments is None else arguments)
    words = [word for word in words if not word.startswith("--local_rank=")]  # DeepSpeed's launcher appends it.
    try:
        status = _run(words)
        sys.stdout.flush()  # Here, where it can still be said that nobody reads it.
        return status
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes once more when it ends.
        return 128 + signal.SIGPIPE
    except ImportError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT


def _sentence(error: Exception) -> str:
    """Say what the system refused, where the error is the system's own."""
    if isinstance(error, OSError) and error.strerror and error.filename:
        return f"{error.filename}: {error.strerror}."
    return str(error)


def _run(words: list[str]) -> int:
    if not words or words[0] in ("-h", "--help"):
        print(USAGE, end="")
        return 0
    if words[0] == "--version":
        print(__version__)
        return 0
    return _run_command(words[0], words[1:])


def _run_command(command: str, words: list[str]) -> int:
    # Imported here, so that help needs no extra, and a missing one is a sentence.
    try:
        with _ended_by_ctrl_c():
            from gatewright.cli.commands import COMMANDS
            from gatewright.cli.errors import in_flags
            from gatewright.train import Interrupted, TrainingDiverged
            from gatewright.train.launch.elastic import DIVERGED
            from gatewright.train.launch.watchdog import LOST_PROCESS, LostProcess
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is not installed: pip install 'gatewright[train]'") from error
    sys.path.append(os.getcwd())  # where tasks and recipes of one's own are found
    try:
        return COMMANDS[known(command, COMMANDS, "command")](words) or 0
    except Interrupted as stop:
        if int(os.environ.get("RANK", 0)) == 0:  # One process says it for all.
            print(stop, file=sys.stderr)
        return 128 + stop.signal_number
    except BrokenPipeError:
        raise
    # What a person can mend is one sentence; anything else is our fault and keeps its traceback.
    except (TrainingDiverged, LostProcess, ValueError, OSError) as error:
        print(f"error: {in_flags(_sentence(error))}", file=sys.stderr)
        return {TrainingDiverged: DIVERGED, LostProcess: LOST_PROCESS}.get(type(error), 2)


@contextlib.contextmanager
def _ended_by_ctrl_c() -> Iterator[None]:
    """Have Ctrl-C end the process while modules are imported, some of which would take it for a failure of theirs."""
    ours = (signal.SIG_DFL, signal.default_int_handler)  # and not that of a program that calls this one
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) not in ours:
        yield
        return
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
