"""Where a run's numbers come from: the data, the command, and the settings that are not the recipe's own."""

import hashlib
import json
import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewright.data import DataConfig, ImageSet, ImageSplits

if TYPE_CHECKING:
    from gatewright.train.config import RunConfig

# These say where a run is kept and where its data lie, not what it computes.
PLACES = ("output", "tracking", "data.path", "data.cache")


@dataclass(frozen=True, kw_only=True)
class DataSplit:
    """One part of the data set that a run used.

    Args:
        name: The data set's name.
        source: Where the data set came from: a folder, the Hugging Face hub, or the library that embeds it.
        split: ``"training"``, ``"held-out"`` or ``"test"``.
        num_images: How many images the part has.
        digest: A hash of its images and labels. Two runs that saw the same images have the same digest.
    """

    name: str
    source: str
    split: str
    num_images: int
    digest: str


def describe_data(config: DataConfig, splits: ImageSplits) -> list[DataSplit]:
    """Return a description of each part that has images."""
    source = _source(config)
    parts = {"training": splits.train, "held-out": splits.holdout, "test": splits.test}
    return [
        DataSplit(name=config.name, source=source, split=split, num_images=len(images), digest=_digest(images))
        for split, images in parts.items()
        if len(images)
    ]


def _source(config: DataConfig) -> str:
    if config.path is not None:
        return str(Path(config.path).expanduser().resolve())
    return "embedded in scikit-learn" if config.name == "digits" else "Hugging Face hub"


def _digest(images: ImageSet) -> str:
    content = hashlib.blake2b(json.dumps(images.class_names).encode(), digest_size=8)
    for tensor in (images.images, images.labels):
        content.update(tensor.contiguous().numpy().data)
    return content.hexdigest()


def command() -> str:
    """Return the command that started this process, as one types it, without the password of a URI."""
    program = Path(sys.argv[0])
    modules = ("gatewright", "gatewright_command")  # by python -m
    ours = program.name == "gatewright" or program.parent.name in modules
    words = [*(["gatewright"] if ours else ["python", str(program)]), *sys.argv[1:]]
    return shlex.join(re.sub(r"//[^/@]*@", "//", word) for word in words)


def describe_origin(config: "RunConfig", recipe: "RunConfig | None", data: list[DataSplit]) -> dict[str, Any]:
    """Return the part of ``result.json`` that says how to make the run again.

    Args:
        config: The run's settings.
        recipe: The recipe's own settings; None where the run was not made from one.
        data: As `describe_data` returns it.
    """
    return {
        "command": command(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": [asdict(split) for split in data],
        "changes": changed_settings(config, recipe) if recipe else None,
    }


def changed_settings(config: "RunConfig", recipe: "RunConfig") -> dict[str, dict[str, Any]]:
    """Return the settings that differ from the recipe's, by name: what the run has, and what the recipe has."""
    changes = _changes(asdict(config), asdict(recipe), "")
    return {
        name: {"run": ours, "recipe": theirs}
        for name, ours, theirs in changes
        if not any(name == place or name.startswith(f"{place}.") for place in PLACES)
    }


def _changes(ours: Mapping[str, Any], theirs: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any, Any]]:
    for key in {**theirs, **ours}:
        one, other = ours.get(key), theirs.get(key)
        if isinstance(one, Mapping) and isinstance(other, Mapping):
            yield from _changes(one, other, f"{prefix}{key}.")
        elif one != other:
            yield f"{prefix}{key}", one, other
