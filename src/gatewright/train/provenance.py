"""Where a run's numbers come from: the data, the command, and the settings that are not the recipe's own."""

import re
import shlex
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gatewright.tasks import DataSplit
from gatewright.train.config import RunConfig

# These say where a run is kept and where its data lie, not what it computes.
PLACES = ("output", "tracking", "data.path", "data.cache")


def command() -> str:
    """Return the command that started this process, as one types it, without the password of a URI."""
    program = Path(sys.argv[0])
    modules = ("gatewright", "gatewright_command")  # by python -m
    ours = program.name == "gatewright" or program.parent.name in modules
    words = [*(["gatewright"] if ours else ["python", str(program)]), *sys.argv[1:]]
    return shlex.join(re.sub(r"//[^/@]*@", "//", word) for word in words)


def describe_origin(config: RunConfig, recipe: RunConfig | None, data: list[DataSplit]) -> dict[str, Any]:
    """Return the part of ``result.json`` that says how to make the run again, with what it changes of its recipe."""
    return {
        "command": command(),
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
        "data": [asdict(split) for split in data],
        "changes": changed_settings(config, recipe) if recipe else None,
    }


def changed_settings(config: RunConfig, recipe: RunConfig) -> dict[str, dict[str, Any]]:
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
