"""The arguments of the commands that work on runs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from gatewright.train import RunConfig


@dataclass(frozen=True)
class TrainArguments:
    """Train a recipe. Every setting of the run is a flag.

    Args:
        run: The run's settings.
        resume: Go on with the run in --output from its newest checkpoint, with the settings that it has.
        dry_run: Check everything, print the settings and what would be trained, and train nothing.
    """

    run: Annotated[RunConfig, tyro.conf.arg(name="")]
    resume: bool = False
    dry_run: bool = False


@dataclass(frozen=True)
class DataPath:
    """Where the data of a run are now.

    Args:
        path: Folder of the data; by default where they were in training.
    """

    path: str | None = None


@dataclass(frozen=True)
class EvaluateArguments:
    """Evaluate a run on the whole test set.

    Args:
        run: The run's folder.
        flip: Average each image with its mirror image.
        data: The place of the data.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    data: DataPath
    flip: bool = False


@dataclass(frozen=True)
class PredictArguments:
    """Say what a trained model makes of files, such as the classes of images, and name the experts that saw them.

    Args:
        run: The run's folder.
        files: Files, and folders of them; sub-folders are searched too.
        top: Number of likeliest classes to name.
        json: Print one JSON object per file, each on a line of its own.
    """

    run: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="RUN")]
    files: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE")]
    top: int = 3
    json: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
