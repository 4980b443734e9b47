"""The file of a run's settings: YAML, written beside the run, and compared with `RunConfig` when it is read back."""

import json
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_args

from gatewright.extras import require
from gatewright.models import ModelConfig, RouterOption
from gatewright.names import hint
from gatewright.train.config import RunConfig

NETWORKS = {network.__name__: network for network in get_args(ModelConfig)}
TAG = "network"  # the key that names a model's class


def save_config(config: RunConfig, path: Path) -> None:
    """Write a config as YAML, into a file that is either complete or as it was."""
    partial = path.with_suffix(".partial")
    partial.write_text(config_text(config), encoding="utf-8")
    partial.replace(path)


def config_text(config: RunConfig) -> str:
    """Write a config as YAML."""
    text: str = require("yaml", "train").safe_dump(_converter().unstructure(config), sort_keys=False)
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
    _refuse_unknown_keys(settings, RunConfig, path)
    return _structured(settings, path)


def settings_of(config: RunConfig) -> dict[str, Any]:
    """Return a config as nested dicts of what JSON has, each number of the type that its field declares.

    Raises:
        ValueError: If a value is of another type.
    """
    typed = _structured(_converter().unstructure(config), "The config")
    settings: dict[str, Any] = json.loads(json.dumps(_converter().unstructure(typed)))
    return settings


def _structured(settings: Any, source: object) -> RunConfig:
    try:
        config: RunConfig = _converter().structure(settings, RunConfig)
    except Exception as error:  # cattrs raises groups of errors of many kinds
        reasons = "; ".join(require("cattrs", "train").transform_error(error, "run", _reason))
        raise ValueError(f"{source} does not describe a run: {reasons}") from error
    return config


def _rename_old_keys(settings: Any) -> None:
    """Give settings of earlier versions the names that they have now."""
    model = settings.get("model") if isinstance(settings, dict) else None
    if isinstance(model, dict) and "split_epoch" in model:
        model.setdefault("upcycle_epoch", model.pop("split_epoch"))


def _refuse_unknown_keys(settings: Any, cls: Any, path: Path, prefix: str = "") -> None:
    """Compare keys, at every level that is a class of ours, with the fields of that class."""
    if not isinstance(settings, dict):
        where = prefix.rstrip(".") or "it"
        raise ValueError(f"{path} does not describe a run: {where} is not a mapping of keys to values.")
    known = {item.name: item.type for item in fields(cls)} | ({TAG: str} if cls in NETWORKS.values() else {})
    for key, value in settings.items():
        if key not in known:
            raise ValueError(f"{path} has an unknown key {prefix + str(key)!r}{hint(key, known, prefix)}")
        inner = _network(value, path) if known[key] == ModelConfig else known[key]
        if is_dataclass(inner):
            _refuse_unknown_keys(value, inner, path, f"{prefix}{key}.")


def _network(settings: Any, path: Path) -> Any:
    """Return the class of a model's settings."""
    name = settings.get(TAG) if isinstance(settings, dict) else None
    if name not in NETWORKS:
        raise ValueError(
            f"{path} has no model.{TAG} called {name!r}{hint(name, NETWORKS)} Known: {', '.join(NETWORKS)}."
        )
    return NETWORKS[name]


def _converter() -> Any:
    """A cattrs converter: strict, and with the model's class beside its settings."""
    converter = require("cattrs", "train").Converter(forbid_extra_keys=True)
    strategies = require("cattrs.strategies", "train")
    for kind in (bool, int, float, str):
        converter.register_structure_hook(kind, _scalar)
    strategies.configure_union_passthrough(RouterOption, converter)
    strategies.configure_tagged_union(ModelConfig, converter, tag_name=TAG)
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
