"""Flags over the settings of a recipe, and the nearest one where there is none."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any

from gatewright.names import nearest
from gatewright.train import RunConfig


def refuse_unknown_flags(words: Sequence[str], flags: Iterable[str]) -> None:
    """Compare every ``--flag`` or ``--flag=value`` with those that there are.

    Raises:
        ValueError: If there is no such flag; the sentence offers the nearest.
    """
    flags = set(flags)
    for word in words:
        name = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and name not in {"--help", *flags}:
            likely = {flag for flag in flags if _last(flag) == _last(name)} or flags
            raise ValueError(f"There is no flag {name}; did you mean {nearest(name, likely)}? --help lists them all.")


def _last(flag: str) -> str:
    """Return what stands behind the last dot."""
    return flag.removeprefix("--").rpartition(".")[2]


def flags_of(settings: Any, prefix: str = "") -> Iterator[str]:
    """Name the flags of a dataclass and of those in it; a switch has one to turn it off, too."""
    for item in fields(settings):
        value, name = getattr(settings, item.name), item.name.replace("_", "-")
        if is_dataclass(value):
            yield from flags_of(value, f"{prefix}{name}.")
        else:
            yield f"--{prefix}{name}"
        if isinstance(value, bool):
            yield f"--{prefix}no-{name}"


def without_options(config: RunConfig) -> RunConfig:
    """Leave out what holds for a recipe's own router alone: its options and losses."""
    return replace(config, model=replace(config.model, router_options={}, losses=None))


def with_options(asked: RunConfig, config: RunConfig) -> RunConfig:
    """Put these back, where flags name no others and the router is the recipe's."""
    found, model = asked.model, config.model
    if found.router != model.router:
        return asked
    options = found.router_options or model.router_options
    losses = model.losses if found.losses is None else found.losses
    return replace(asked, model=replace(found, router_options=options, losses=losses))
