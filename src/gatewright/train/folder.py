"""The folder of a run: where it is, and what a run that is resumed finds in it."""

import contextlib
import errno
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from gatewright.data import ImageSet
from gatewright.train.checkpoint import checkpoints, load_checkpoint, newest_checkpoint
from gatewright.train.config import RunConfig
from gatewright.train.processes import ALONE, Processes
from gatewright.train.program import program

CONFIG = "config.yaml"
NOW = "%Y%m%d%H%M%S"
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def find_output(config: RunConfig, resume: bool) -> Path:
    """Name the run's folder, unless that would mix two runs."""
    output = Path(config.output or _named(config, int(f"{datetime.now():{NOW}}")))
    in_the_way = next((path for path in (output, *output.parents) if path.exists() and not path.is_dir()), None)
    if in_the_way:
        raise FileExistsError(f"{in_the_way} is a file, and --output names the run's folder. Name another.")
    there = next(path for path in (output, *output.parents) if path.exists())
    if not is_writable(there):
        raise PermissionError(f"{there} cannot be written to, and the run's folder is to be {output}. Name another.")
    exists = (output / CONFIG).is_file()
    if resume and not exists:
        raise FileNotFoundError(f"There is no run to resume at {output}: name its folder with --output.")
    if exists and not resume:
        raise FileExistsError(f"{output} holds a run already. Go on with it by --resume, or name another --output.")
    return output


def is_writable(folder: Path) -> bool:
    """Whether this process may write into a folder that is there."""
    return os.access(folder, os.W_OK, effective_ids=os.access in os.supports_effective_ids)


def agreed_name(output: Path, config: RunConfig, processes: Processes) -> Path:
    """Return the run's folder, by the latest of all processes' clocks where these name it."""
    if config.output is not None or processes.world == 1:
        return output
    latest = processes.agree(int(output.name.removeprefix(f"{config.recipe}-").replace("-", "")))
    assert latest is not None
    return Path(_named(config, latest))


def _named(config: RunConfig, now: int) -> str:
    digits = str(now)
    return f"runs/{config.recipe}-{digits[:8]}-{digits[8:]}"


def refuse_a_late_split(config: RunConfig, epoch: int) -> None:
    """Refuse to train, from an epoch on, experts that begin as one and would still be one at the end."""
    split = config.model.split_epoch
    if config.model.num_experts > 1 and epoch < config.epochs <= split:
        raise ValueError(
            f"The experts begin as one network and split at epoch {split}, counted from 0, but the run ends after "
            f"{config.epochs} (--epochs) and would never be a mixture. Use --epochs {split + 1} or more, a "
            f"--model.split-epoch below {config.epochs}, or --model.num-experts 1 for the dense twin."
        )


@contextlib.contextmanager
def room_in(config: RunConfig, output: Path) -> Iterator[None]:
    """Say what to do where the disk fills up while a run writes anything but a checkpoint, which says it itself."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        good = newest_checkpoint(output / "checkpoints")
        way_on = f"{good} is intact: go on with: {resume_command(config, output)}" if good else "name another --output"
        raise OSError(f"There is no room to write the run's files to {output}. Make room, and {way_on}.") from error


def resume_command(config: RunConfig, output: Path) -> str:
    """Say what to type to go on with a run."""
    return f"{program()} train {config.recipe} --output {shlex.quote(str(output))} --resume"


def check_same_images(
    images: ImageSet, class_names: Sequence[str], image_shape: Sequence[int], *, where: str = "--data.path"
) -> None:
    """Refuse images of other classes or another shape than a model was trained on.

    Raises:
        ValueError: The sentence holds both.
    """
    found, shape = tuple(images.class_names), tuple(images.images.shape[1:])
    if found != tuple(class_names):
        raise ValueError(f"The run was trained on the classes {_few(class_names)}; {where} has {_few(found)}.")
    if shape != tuple(image_shape):
        raise ValueError(
            f"The run was trained on images of shape {tuple(image_shape)} (channels, height, width); {where} has "
            f"{shape}. Set --data.image-size, or use the images that it was trained on."
        )


def _few(names: Sequence[str]) -> str:
    return ", ".join([*names[:12], *(["..."] if len(names) > 12 else [])]) + f" ({len(names)})"


def agreed_state(output: Path, processes: Processes = ALONE) -> dict[str, Any] | None:
    """Read the newest checkpoint that is intact; None where the run stopped before its first one, and so begins again.

    Newer ones that are damaged are named, and set aside under another name.

    Raises:
        ValueError: If all are damaged.
        FileNotFoundError: If this process finds an older one than another does.
    """
    state, damaged = newest_intact(output / "checkpoints")
    step = None if state is None else state["engine"]["step_count"]
    newest = processes.agree(step)
    if newest != step:
        raise FileNotFoundError(
            f"In {output} process {processes.rank} finds the checkpoint of step {step}, and another process that of "
            f"step {newest}. The run's folder (--output) is to be one that all processes share."
        )
    for path in damaged if processes.rank == 0 else ():
        aside = path.rename(path.with_name(f"{path.name}.damaged"))
        print(f"warning: {path} is damaged, and is now {aside.name}; going on from step {step}.", file=sys.stderr)
    return state


def newest_intact(folder: Path) -> tuple[dict[str, Any] | None, list[Path]]:
    """Return the newest state that can be read, and the checkpoints that came after it.

    Raises:
        ValueError: If all are damaged.
    """
    damaged: list[Path] = []
    reason = None
    for path in reversed(checkpoints(folder)):
        try:
            return load_checkpoint(path), damaged
        except ValueError as error:
            damaged.append(path)
            reason = reason or error
    if reason:
        raise reason
    return None, []
