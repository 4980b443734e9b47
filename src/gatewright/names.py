"""Names that a person types, and the nearest one where there is none."""

import difflib
import pkgutil
from collections.abc import Iterable
from typing import Any


def known(name: str, names: Iterable[str], what: str) -> str:
    """Return the name if it is one of the names.

    Raises:
        ValueError: If not; the sentence offers the nearest.
    """
    names = list(names)
    if name not in names:
        raise ValueError(f"No {what} is called {name!r}{hint(name, names)} Known: {', '.join(names) or 'none'}.")
    return name


def imported(name: str, what: str) -> Any:
    """Import what a person names by its module, as ``"module:function"``.

    Raises:
        ValueError: If there is none.
    """
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(
            f"The {what} {name} cannot be imported: {error}. Put the folder of its module on PYTHONPATH."
        ) from error


def hint(name: object, names: Iterable[str], prefix: str = "") -> str:
    """End a sentence with the name of most similar spelling, or with a full stop where none is similar."""
    found = difflib.get_close_matches(str(name), sorted(names), 1, 0.5)
    return f"; did you mean {prefix + found[0]!r}?" if found else "."
