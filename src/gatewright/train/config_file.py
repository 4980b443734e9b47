"""The file of a run's settings: YAML, written beside the run, and compared with `RunConfig` when it is read back."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from gatewright.data import BatchConfig
from gatewright.extras import require
from gatewright.models import MixtureConfig, RouterOption
from gatewright.names import hint
from gatewright.tasks import Task, task_named
from gatewright.train.config import RunConfig

TAG = "network"  # the key that names a model's class


def save_config(config: RunConfig, path: Path) -> None:
    """Write a config as YAML, into a file that is either complete or as it was."""
    partial = path.with_suffix(".partial")
    partial.write_text(config_text(config), encoding="utf-8")
    partial.replace(path)


def config_text(config: RunConfig) -> str:
    """Write a config as YAML."""
    text: str = require("yaml", "train").safe_dump(
        _converter(task_named(config.task)).unstructure(config), sort_keys=False
    )
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
        settings = yaml.safe_load(text if isinstance(text, str) else text.decode("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}") from error
    _rename_old_keys(settings)
    _refuse_unknown_keys(settings, RunConfig, path, task=_task(settings, path))
    return _structured(settings, path)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return a config as nested dicts of what JSON has, each number of the type that its field declares.

    Raises:
        ValueError: If a value is of another type.
    """
    converter = _converter(task_named(config.task))
    typed = _structured(converter.unstructure(config), "The config")
    settings: dict[str, Any] = json.loads(json.dumps(converter.unstructure(typed)))
    return settings


def _structured(settings: Any, source: object) -> RunConfig:
    try:
        config: RunConfig = _converter(_task(settings, source)).structure(settings, RunConfig)
    except Exception as error:  # cattrs raises groups of errors of many kinds
        reasons = "; ".join(require("cattrs", "train").transform_error(error, "run", _reason))
        raise ValueError(f"{source} does not describe a run: {reasons}") from error
    return config


def _rename_old_keys(settings: Any) -> None:
    """Give settings of earlier versions the names that they have now."""
    model = settings.get("model") if isinstance(settings, dict) else None
    if isinstance(model, dict) and "split_epoch" in model:
        model.setdefault("upcycle_epoch", model.pop("split_epoch"))


def _task(settings: Any, source: object) -> Task:
    """Return the task of settings; files of version 0.1.0 do not say that it is classification."""
    name = settings.get("task", "classification") if isinstance(settings, dict) else "classification"
    try:
        return task_named(str(name))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def _refuse_unknown_keys(settings: Any, cls: Any, path: Path, prefix: str = "", *, task: Task) -> None:
    """Compare keys, at every level that is a class of ours, with the fields of that class."""
    if not isinstance(settings, dict):
        where = prefix.rstrip(".") or "it"
        raise ValueError(f"{path} does not describe a run: {where} is not a mapping of keys to values.")
    known = {item.name: item.type for item in fields(cls)} | ({TAG: str} if cls in task.models else {})
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{path} has an unknown key {prefix + str(key)!r}{hint(key, known, prefix)}")
        inner = known[key]
        if inner is MixtureConfig:
            inner = _network(value, task, path)
        if inner is BatchConfig:
            inner = task.data
        if is_dataclass(inner):
            _refuse_unknown_keys(value, inner, path, f"{prefix}{key}.", task=task)


def _network(settings: Any, task: Task, source: object) -> type[MixtureConfig]:
    """Return the class of a model's settings."""
    networks = {network.__name__: network for network in task.models}
    name = settings.get(TAG) if isinstance(settings, dict) else None
    if name not in networks:
        raise ValueError(
            f"{source} has no model.{TAG} called {name!r}{hint(name, networks)} Known: {', '.join(networks)}."
        )
    return networks[name]


def _converter(task: Task) -> Any:
    """A cattrs converter: strict, with the task's classes of settings, and the model's class beside its settings."""
    converter = require("cattrs", "train").Converter(forbid_extra_keys=True)
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _scalar)
    require("cattrs.strategies", "train").configure_union_passthrough(RouterOption, converter)

    def read_model(settings: Any, _: Any) -> Any:
        rest = {key: value for key, value in settings.items() if key != TAG}
        return converter.structure(rest, _network(settings, task, "It"))

    def model_settings(model: MixtureConfig) -> dict[str, Any]:
        return {**converter.unstructure(model, type(model)), TAG: type(model).__name__}

    converter.register_structure_hook_func(lambda kind: kind is MixtureConfig, read_model)
    converter.register_unstructure_hook_func(lambda kind: kind is MixtureConfig, model_settings)
    converter.register_structure_hook_func(
        lambda kind: kind is BatchConfig, lambda settings, _: converter.structure(settings, task.data)
    )
    converter.register_unstructure_hook_func(
        lambda kind: kind is BatchConfig, lambda data: converter.unstructure(data, type(data))
    )
    return converter


def _scalar(value: Any, kind: type) -> Any:
    """Take a value of the right type, where cattrs alone would make 2 epochs of 2.7, and true of "no"."""
    if kind is float and type(value) in (int, str):  # YAML 1.1 reads 1e-3 as a string.
        return float(value)
    if type(value) is not kind:
        raise ValueError(f"expected {kind.__name__}, got {value!r}")
    return value


def _reason(error: BaseException, kind: Any) -> str:
    return "required, and missing" if isinstance(error, KeyError) else str(error)
