"""Flags over the settings of a recipe, and one sentence where a flag or its value is wrong."""

import contextlib
import difflib
import io
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any, TypeVar

import tyro

from gatewright.cli.pairs import mapping_rule
from gatewright.train import RunConfig

Arguments = TypeVar("Arguments")
ANSI = re.compile(r"\x1b\[[0-9;]*m")
OTHERS_WORDS = {
    "learning-rate": "lr",
    "batch": "batch-size",
    "gpus": "processes",
    "experts": "num-experts",
    "wd": "weight-decay",
}
"""Flags as they are called elsewhere, and as they are called here."""
RULE = re.compile(r"^\W*[─-]{4,}\W*$", re.MULTILINE)


def parse(
    kind: type[Arguments], words: Sequence[str], *, prog: str, default: Arguments | Any = tyro.MISSING_NONPROP
) -> Arguments:
    """Read words as the fields of a dataclass; ``--help`` prints them and ends the process.

    Raises:
        ValueError: If a word is no flag, or a value does not fit.
    """
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            arguments = tyro.cli(
                kind, prog=prog, args=words, default=default, config=(tyro.conf.AvoidSubcommands,), registry=registry()
            )
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ValueError(f"{_sentence(said.getvalue(), stop)} See {prog} --help.") from None
    sys.stderr.write(said.getvalue())  # what a setting warns of
    return arguments


def registry() -> tyro.constructors.ConstructorRegistry:
    """Return what the parser of flags is told of mappings."""
    rules = tyro.constructors.ConstructorRegistry()
    rules.primitive_rule(mapping_rule)
    return rules


def _sentence(box: str, stop: SystemExit) -> str:
    """Return what a setting said of its values; or else what the parser said, without the frame round it."""
    refused = _cause(stop)
    below_title = ANSI.sub("", box).partition("\n")[2]
    part = next(filter(str.strip, RULE.split(below_title)), box)
    text = " ".join(word for word in part.split() if word not in ("│", "|")).replace(" (required)", "")
    if refused is not None and not text.startswith("Error parsing --"):
        text = str(refused)
    return text.removeprefix("Error parsing ").rstrip(".") + "."


def _cause(error: BaseException) -> ValueError | None:
    """Return the first of the errors that led to this one, where it is about a value."""
    while (before := error.__cause__ or (None if error.__suppress_context__ else error.__context__)) is not None:
        error = before
    return error if isinstance(error, ValueError) else None


def refuse_unknown_flags(words: Sequence[str], flags: Iterable[str]) -> None:
    """Compare every ``--flag`` or ``--flag=value`` with those that there are.

    Raises:
        ValueError: If there is no such flag, where the sentence offers the nearest, or if a switch is given a value.
    """
    flags = set(flags)
    for word, following in pairwise([*words, ""]):
        name = word.partition("=")[0].replace("_", "-")
        if word.startswith("--") and name not in {"--help", *flags}:
            likely = _similar(name, flags)
            raise ValueError(
                f"There is no flag {name}{f'; did you mean {likely}?' if likely else '.'} --help lists all."
            )
        if (off := turn_off(name)) in flags and following.lower() in ("true", "false"):
            raise ValueError(f"{name} is a switch without a value; got {following}. Give {name} alone, or {off}.")


def turn_off(flag: str) -> str:
    """Return the flag that turns a switch off."""
    section, dot, last = flag.removeprefix("--").rpartition(".")
    return f"--{section}{dot}no-{last}"


def _similar(name: str, flags: Iterable[str]) -> str | None:
    """Return the flag that was most likely meant: of the same last part, else of a similar one; None where none is."""
    last = OTHERS_WORDS.get(_last(name), _last(name))
    by_last = {_last(flag): flag for flag in sorted(flags, reverse=True)}
    whole = difflib.get_close_matches(name, sorted(flags), 1, 0.8)
    parts = difflib.get_close_matches(last, by_last, 1, 0.7)
    same = [flag for flag in flags if _last(flag) == last]
    return next(
        iter([*difflib.get_close_matches(name, same, 1, 0.0), *whole, *(by_last[part] for part in parts)]), None
    )


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
            yield turn_off(f"--{prefix}{name}")


def with_router(asked: RunConfig, recipe: RunConfig, words: Sequence[str]) -> RunConfig:
    """Give a router other than the recipe's its own options and losses, where no flag says which."""
    if asked.model.router == recipe.model.router:
        return asked
    given = {word.partition("=")[0].replace("_", "-") for word in words}
    defaults: dict[str, Any] = {"router_options": {}, "losses": None}
    changed = {name: value for name, value in defaults.items() if f"--model.{name}".replace("_", "-") not in given}
    return replace(asked, model=replace(asked.model, **changed))
