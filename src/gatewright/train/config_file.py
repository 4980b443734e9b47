"""The file of a run's settings: YAML, written beside the run, and compared with `RunConfig` when it is read back."""

import json
import re
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from gatewright.atomic import atomic_write
from gatewright.extras import require
from gatewright.models import MixtureConfig
from gatewright.names import hint
from gatewright.settings import from_json
from gatewright.tasks import Task, task_named
from gatewright.train.config import RunConfig

TAG = "network"  # the key that names a model's class


def save_config(config: RunConfig, path: Path) -> None:
    """Write a config as YAML, into a file that is either complete or as it was."""
    with atomic_write(path) as partial:
        partial.write_text(config_text(config), encoding="utf-8")


def config_text(config: RunConfig) -> str:
    """Write a config as YAML."""
    text: str = require("yaml", "train").safe_dump(settings_of(config), sort_keys=False)
    return text


def load_config(path: Path) -> RunConfig:
    """Read a config that `save_config` wrote.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not YAML, or a key or value does not fit; the sentence names the nearest key.
    """
    if not path.is_file():
        raise FileNotFoundError(f"No run at {path.parent}: it has no {path.name}. Name a folder that train wrote.")
    return read_config(path.read_bytes(), path)


def read_config(text: str | bytes, path: Path) -> RunConfig:
    """Read the YAML of a config that stands in a file.

    Raises:
        ValueError: If it is not YAML, or a key or value does not fit; the sentence names the file and the nearest key.
    """
    yaml = require("yaml", "train")
    try:
        settings = yaml.load(text if isinstance(text, str) else text.decode("utf-8"), _loader(yaml))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    _rename_old_keys(settings)
    try:
        return config_of(settings)
    except ValueError as error:
        raise ValueError(f"{path} does not describe a run: {error}") from error


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return a config as nested dicts of what JSON has, with the model's class beside its settings."""
    settings: dict[str, Any] = json.loads(json.dumps(asdict(config)))
    settings["model"][TAG] = type(config.model).__name__
    return settings


def config_of(settings: Any) -> RunConfig:
    """Return the config that `settings_of` describes."""
    if not isinstance(settings, dict):
        raise ValueError("it is not a mapping of keys to values.")
    task = task_named(settings.get("task", "classification"))  # Files of version 0.1.0 do not say.
    kinds: dict[str, Any] = {item.name: item.type for item in fields(RunConfig)}
    kinds |= {"data": task.data, "model": MixtureConfig}
    values = {}
    for name, value in settings.items():
        if name not in kinds:
            raise ValueError(f"There is no setting {name!r}{hint(name, kinds)}")
        kind = kinds[name]
        if name == "model":
            kind, value = _network(value, task)
        values[name] = from_json(kind, json.dumps(value, default=str), name)
    return RunConfig(**values)


def _rename_old_keys(settings: Any) -> None:
    """Give settings of earlier versions the names that they have now."""
    model = settings.get("model") if isinstance(settings, dict) else None
    if isinstance(model, dict) and "split_epoch" in model:
        model.setdefault("upcycle_epoch", model.pop("split_epoch"))


def _network(settings: Any, task: Task) -> tuple[type[MixtureConfig], dict[str, Any]]:
    """Return the class of a model's settings, and these without its name."""
    networks = {network.__name__: network for network in task.models}
    name = settings.get(TAG) if isinstance(settings, dict) else None
    if name not in networks:
        raise ValueError(f"There is no `model.{TAG}` {name!r}{hint(name, networks)} Known: {', '.join(networks)}.")
    return networks[name], {key: value for key, value in settings.items() if key != TAG}


def _loader(yaml: Any) -> Any:
    """Make a loader that reads 1e-3 as a number: YAML 1.1, which the library reads, wants 1.0e-3."""
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    number = re.compile(r"[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$")
    loader.add_implicit_resolver("tag:yaml.org,2002:float", number, list("-+0123456789"))
    return loader
