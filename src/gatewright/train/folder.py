"""The folder of a run: where it is, and what a run that is resumed finds in it."""

import contextlib
import errno
import os
import shlex
import shutil
import sys
from collections.abc import Iterator
from datetime import datetime
from itertools import count
from pathlib import Path
from typing import Any

from gatewright.train.checkpoint.format import checkpoints, load_checkpoint, newest_checkpoint
from gatewright.train.config import RunConfig
from gatewright.train.config_file import load_config, settings_of
from gatewright.train.lock import locked
from gatewright.train.strategies.single import ALONE, Strategy, largest

CONFIG = "config.yaml"
RUNS = "runs"
LOCK = ".lock"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def check_output(config: RunConfig, resume: bool) -> None:
    """Refuse a folder in which two runs would be mixed, or none could be gone on with.

    Raises:
        FileExistsError: If it is a file, or holds a run already and `resume` is not set.
        FileNotFoundError: If there is no run to resume.
    """
    output = Path(config.output or RUNS)
    in_the_way = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
    if in_the_way:
        raise FileExistsError(f"{in_the_way} is a file, and `output` names the run's folder. Name another.")
    there = next(path for path in (output, *output.parents) if path.exists())
    if not is_writable(there):
        raise PermissionError(f"{there} cannot be written to, and the run's folder is to be {output}. Name another.")
    exists = config.output is not None and (output / CONFIG).is_file()
    if resume and not exists:
        raise FileNotFoundError(f"There is no run to resume at {output}: name its folder with `output`.")
    if exists and not resume:
        raise FileExistsError(
            f"{output} holds a run already. Go on with it by `resume=True`, or name another `output`."
        )


def is_writable(folder: Path) -> bool:
    """Whether this process may write into a folder that is there."""
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


@contextlib.contextmanager
def own_folder(config: RunConfig, resume: bool, strategy: Strategy = ALONE) -> Iterator[Path]:
    """Hold the run's folder, which no other run trains in meanwhile.

    Raises:
        FileExistsError: If another run does, or it holds one already and `resume` is not set.
    """
    output = Path(config.output) if config.output else new_folder(config, strategy)
    with contextlib.ExitStack() as stack:
        held = True
        if strategy.rank == 0:  # It holds the lock for all of the run's processes.
            output.mkdir(parents=True, exist_ok=True)
            held = stack.enter_context(locked(output / LOCK, wait=False))
        if largest(strategy, None if held else 1) is not None:
            raise FileExistsError(
                f"Another run is training in {output} at this moment. Wait until it has ended, or stop it; or name "
                "another folder with `output`."
            )
        stack.enter_context(room_in(config, output))
        check_output(config, resume)  # Again: a run that has just ended may have been in it.
        yield output


def new_folder(config: RunConfig, strategy: Strategy) -> Path:
    """Make a folder of the run's own, named after the moment by the latest of its processes' clocks."""
    now = str(largest(strategy, int(f"{datetime.now():%Y%m%d%H%M%S}")))
    name = f"{RUNS}/{config.recipe.replace(':', '-')}-{now[:8]}-{now[8:]}"
    number = largest(strategy, _claim(name) if strategy.rank == 0 else None)
    assert number is not None
    return _numbered(name, number)


def _claim(name: str) -> int:
    """Make the first folder of a name that is no other run's, and return its number."""
    for number in count(1):
        with contextlib.suppress(FileExistsError):
            _numbered(name, number).mkdir(parents=True)
            return number
    raise AssertionError


def _numbered(name: str, number: int) -> Path:
    return Path(name if number == 1 else f"{name}-{number}")


@contextlib.contextmanager
def room_in(config: RunConfig, output: Path) -> Iterator[None]:
    """Say what to do where the disk fills up while a run writes anything but a checkpoint, which says it itself."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        good = newest_checkpoint(output / "checkpoints")
        way_on = f"{good} is intact: go on with: {resume_command(config, output)}" if good else "name another `output`"
        raise OSError(f"There is no room to write the run's files to {output}. Make room, and {way_on}.") from error


def program() -> str:
    """Return ``gatewright`` where a shell finds it, else the path or the interpreter by which it was started."""
    if shutil.which("gatewright"):
        return "gatewright"
    if Path(sys.argv[0]).name == "gatewright":
        return shlex.quote(sys.argv[0])
    return f"{shlex.quote(sys.executable)} -m gatewright"


def resume_command(config: RunConfig, output: Path) -> str:
    """Say what to type to go on with a run."""
    return f"{program()} train {config.recipe} --output {shlex.quote(str(output))} --resume"


def agreed_state(output: Path, strategy: Strategy) -> dict[str, Any] | None:
    """Read the newest checkpoint that is intact; None where the run stopped before its first one, and so begins again.

    Newer ones that are damaged are named, and set aside under another name.

    Raises:
        ValueError: If all are damaged.
        FileNotFoundError: If this process finds an older one than another does.
    """
    state, damaged = newest_intact(output)
    step = None if state is None else state["engine"]["step_count"]
    newest = largest(strategy, step)
    if newest != step:
        raise FileNotFoundError(
            f"In {output} process {strategy.rank} finds the checkpoint of step {step}, and another process that of "
            f"step {newest}. The run's folder (`output`) is to be one that all processes share."
        )
    for path in damaged if strategy.rank == 0 else ():
        aside = path.rename(path.with_name(f"{path.name}.damaged"))
        print(f"warning: {path} is damaged, and is now {aside.name}; going on from step {step}.", file=sys.stderr)
    return state


def newest_intact(output: Path) -> tuple[dict[str, Any] | None, list[Path]]:
    """Return the newest state of a run that can be read, and the checkpoints that came after it."""
    damaged: list[Path] = []
    reason = None
    for path in reversed(checkpoints(output / "checkpoints")):
        try:
            state = load_checkpoint(path)
        except ValueError as error:
            damaged.append(path)
            reason = reason or error
            continue
        if "config" not in state:  # Version 0.1.0 kept it beside the checkpoints alone.
            state["config"] = settings_of(load_config(output / CONFIG))
        return state, damaged
    if reason:
        raise reason
    return None, []
