"""Mappings on the command line: ``--flag NAME VALUE NAME VALUE``, or ``None`` where a setting may be that."""

from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args, get_origin

from tyro.constructors import PrimitiveConstructorSpec, PrimitiveTypeInfo

from gatewright.models.options import described, fits

WORDS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": None, "null": None}


def mapping_rule(info: PrimitiveTypeInfo) -> PrimitiveConstructorSpec[Any] | None:
    """Tell the parser of flags how any mapping is written, and how a default is shown."""
    kinds = [kind for kind in (info.type, *get_args(info.type)) if get_origin(kind) is dict]
    if not kinds:
        return None
    optional = NoneType in get_args(info.type)
    (kind,) = kinds
    return PrimitiveConstructorSpec(
        nargs="*",
        metavar="NAME VALUE ..." + (" | None" if optional else ""),
        instance_from_str=lambda words: read_mapping(words, get_args(kind)[1], optional=optional),
        is_instance=lambda value: isinstance(value, dict) or (optional and value is None),
        str_from_instance=_shown,
    )


def read_mapping(words: list[str], annotation: Any, *, optional: bool) -> dict[str, Any] | None:
    """Read names and values that alternate."""
    if optional and [WORDS.get(word.lower(), word) for word in words] == [None]:
        return None
    if len(words) % 2:
        either = ", or None alone" if optional else ""
        raise ValueError(f"names and values alternate (NAME VALUE NAME VALUE){either}; got {' '.join(words)}")
    found = {name: read_value(text) for name, text in zip(words[::2], words[1::2], strict=True)}
    for name, value in found.items():
        if not fits(value, annotation):
            raise ValueError(f"the value of {name} is {described(annotation)}; got {value!r}")
    return found


def read_value(text: str) -> bool | int | float | str | None:
    """Read a value as YAML would: true or false, None, a number, or else the word itself."""
    if text.lower() in WORDS:
        return WORDS[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _shown(value: Mapping[str, Any] | None) -> list[str]:
    """Write a mapping as its flag would."""
    return ["None"] if value is None else [str(part) for pair in value.items() for part in pair]
