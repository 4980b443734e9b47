"""The library's errors in the words of the command line: the fields that they name become flags."""

import re

from gatewright.cli.change import CHANGES, change_flags
from gatewright.cli.flags import flags_of, turn_off
from gatewright.cli.plan import Question
from gatewright.recipes import RECIPES

FIELD = re.compile(r"`([a-z_]+(?:\.[a-z_]+)*)(?:=([^`]*))?`")
"""A field, or a field with a value to give it, as the library writes them: `optim.lr`, `model.layer="gatewright"`."""


def in_flags(sentence: str) -> str:
    """Write the fields that a sentence names in backquotes as flags."""
    known = every_flag()

    def flag(found: re.Match[str]) -> str:
        name, value = f"--{found[1].replace('_', '-')}", (found[2] or "").strip("\"'")
        if name not in known:
            return found[0]
        if turn_off(name) in known and value in ("True", "False"):
            return name if value == "True" else turn_off(name)
        return f"{name} {value}".rstrip()

    return FIELD.sub(flag, sentence)


def every_flag() -> set[str]:
    """Return the flags of all commands that take settings."""
    configs = [recipe() for recipe in RECIPES.values()]
    switches = {"--resume", "--no-resume", "--dry-run"}
    changes = (change_flags(arguments) for _, arguments in CHANGES.values())
    return switches.union(*map(flags_of, configs), flags_of(Question()), *changes)
