"""Settings: frozen dataclasses whose values pydantic checks when they are made, with errors in our own sentences."""

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import field, fields, is_dataclass
from typing import Any, TypeVar, dataclass_transform

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from gatewright.names import hint

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
def settings(section: str = "") -> Callable[[type[T]], type[T]]:
    """Make a class a frozen dataclass that checks its values against their annotations.

    Numbers have their type and range in the annotation, such as ``Annotated[float, Field(gt=0)]``, and words are a
    ``Literal``. Nothing is converted, except an integer to a float.

    Args:
        section: Place of the class in a run's config, such as ``"optim"``; errors name fields from there.
    """

    def decorate(cls: type[T]) -> type[T]:
        made: Any = dataclass(
            cls, frozen=True, kw_only=True, config=ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
        )
        check = made.__init__

        @functools.wraps(check)
        def init(self: T, **values: Any) -> None:
            with _our_words(type(self), section):
                check(self, **values)

        made.__init__ = init
        return made  # type: ignore[no-any-return]

    return decorate


def from_json(kind: Any, text: str, section: str = "") -> Any:
    """Read a value of a class of settings, or of any other type of a field, from JSON.

    Raises:
        ValueError: If it does not fit; the sentence names the field, what it was given, and the nearest field where
            there is none of that name.
    """
    with _our_words(kind, section):
        return TypeAdapter(kind).validate_json(text, strict=True)


@contextlib.contextmanager
def _our_words(kind: Any, section: str) -> Iterator[None]:
    try:
        yield
    except ValidationError as error:
        found = [_sentence(kind, section, each) for each in error.errors(include_url=False)]
        raise ValueError(" ".join(found)) from None


def _sentence(kind: Any, section: str, error: Mapping[str, Any]) -> str:
    """Say the rule, the value and where it stands."""
    places = [part for part in error["loc"] if isinstance(part, str)]  # An item of a tuple goes by the tuple's name.
    *outer, name = [*([section] if section else []), *places] or [""]
    prefix = "".join(f"{part}." for part in outer)
    match error["type"]:
        case "value_error":
            return str(error["ctx"]["error"])
        case "unexpected_keyword_argument":
            return f"There is no setting {prefix + name!r}{hint(name, _names_at(kind, error['loc'][:-1]), prefix)}"
        case "missing" | "missing_keyword_only_argument":
            return f"`{prefix}{name}` is required, and missing."
    rule = error["msg"].partition(" ")[2]  # after "Input", "String" or "Tuple"
    return f"`{prefix}{name}` {rule}; got {error['input']!r}."


def _names_at(kind: Any, location: tuple[int | str, ...]) -> list[str]:
    """Return the names of the fields of the class at a place inside another."""
    for part in filter(lambda part: isinstance(part, str), location):
        kind = next(item.type for item in fields(kind) if item.name == part)
    return [item.name for item in fields(kind)] if is_dataclass(kind) else []
