"""Keyword arguments that come from a config or a command line, compared with the signature that they are for."""

import inspect
from collections.abc import Collection, Mapping
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

from gatewright.names import known

WORDS: Mapping[Any, str] = {
    bool: "true or false",
    int: "an integer",
    float: "a number",
    str: "a word",
    NoneType: "None",
}


def check_options(make: type, options: Mapping[str, object], what: str, *, given: Collection[str] = ()) -> None:
    """Compare options with the parameters of a class, by name and by annotation.

    Args:
        make: The class that the options are keyword arguments of.
        options: The values of the options, by name.
        what: Name of the class in an error, such as ``"the router top-k"``.
        given: Parameters that come from elsewhere, and so are no options.

    Raises:
        ValueError: If the class has no such parameter, or a value is not of the type that it is annotated with.
    """
    accepted = {name: each.annotation for name, each in inspect.signature(make).parameters.items() if name not in given}
    for name, value in options.items():
        annotation = accepted[known(name, accepted, f"option of {what}")]
        if not fits(value, annotation):
            raise ValueError(f"The option {name} of {what} is {described(annotation)}; got {value!r}.")


def fits(value: object, annotation: Any) -> bool:
    """Whether a value is of an annotated type; an integer is a number, and true and false are neither."""
    if annotation in (Any, inspect.Parameter.empty):
        return True
    if get_origin(annotation) is Literal:
        return value in get_args(annotation)
    if get_origin(annotation) in (Union, UnionType):
        return any(fits(value, part) for part in get_args(annotation))
    return type(value) in (int, float) if annotation is float else type(value) is annotation


def described(annotation: Any) -> str:
    """Say in words which values an annotation allows."""
    if get_origin(annotation) is Literal:
        return " or ".join(map(repr, get_args(annotation)))
    if get_origin(annotation) in (Union, UnionType):
        return " or ".join(described(part) for part in get_args(annotation))
    return WORDS.get(annotation, str(annotation))
