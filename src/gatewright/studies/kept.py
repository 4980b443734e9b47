"""What is kept of a study's run: one JSON file with all that its page says, and nothing of this machine's folders."""

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from gatewright.report import MeasuredRun
from gatewright.studies.plan import PlannedRun
from gatewright.train import RunConfig, load_config
from gatewright.train.config_file import settings_of
from gatewright.train.result import write_json

BULKY = ("class_by_expert", "tokens_per_class", "spans", "profiles", "alike")
"""What a result says of a layer and no page of a study does: pages of numbers."""


def keep(run: PlannedRun, jobs: int) -> dict[str, Any]:
    """Write the file of a run that has ended, and return its content."""
    content: dict[str, Any] = MeasuredRun.read(run.folder).kept()
    content.pop("tracking", None)
    content["layers"] = {name: _slim(layer) for name, layer in content["layers"].items()}
    study = {"name": run.study, "tier": run.tier, "arm": run.arm.name, "jobs": jobs}
    content |= {"study": study, "commit": commit(), "settings": settings(run.config)}
    run.file.parent.mkdir(parents=True, exist_ok=True)
    content = json.loads(_without_places(json.dumps(content), run))
    write_json(content, run.file)
    return content


def settings(config: RunConfig) -> dict[str, Any]:
    """Return the settings of a run but for those that say where it is kept and where its data lie."""
    found = settings_of(config)
    for place in ("output", "tracking"):
        del found[place]
    for place in ("path", "cache"):
        found["data"].pop(place, None)
    return found


def changes(run: PlannedRun) -> str:
    """Say which settings of an arm are not those that its kept or unfinished run has had; empty where all are."""
    saved = run.folder / "config.yaml"
    if run.file.is_file():
        before = json.loads(run.file.read_text(encoding="utf-8"))["settings"]
        return _said(run.file, differences(before, settings(run.config)))
    return _said(run.folder, differences(settings(load_config(saved)), settings(run.config))) if saved.is_file() else ""


def _said(place: Path, found: Sequence[str]) -> str:
    return f"{place}: {', '.join(found)}" if found else ""


def differences(one: Mapping[str, Any], other: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Name the settings that both have, with different values."""
    found = []
    for name in one.keys() & other.keys():
        if isinstance(one[name], Mapping) and isinstance(other[name], Mapping) and "." not in prefix:
            found += differences(one[name], other[name], f"{prefix}{name}.")
        elif one[name] != other[name]:
            found.append(f"{prefix}{name} was {one[name]} and is {other[name]}")
    return sorted(found)


def commit() -> str | None:
    """Return the commit of the repository that this package is in, with a plus where files have changed since."""
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty=+", "--exclude=*"]
    try:
        said = subprocess.run(git, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()


def _slim(layer: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in layer.items() if name not in BULKY}


def _without_places(text: str, run: PlannedRun) -> str:
    """Write FOLDER for the folder of the data, and runs/... for that of the run."""
    places = {str(run.folder): f"runs/{run.study}/{run.tier}/{run.folder.name}"}
    if path := getattr(run.config.data, "path", None):
        places |= {str(Path(path).expanduser().resolve()): "FOLDER", path: "FOLDER"}
    for place, name in places.items():
        text = text.replace(json.dumps(place)[1:-1], name)
    return text
