"""Names that a person types, and the nearest one where there is none."""

import difflib
from collections.abc import Iterable


def known(name: str, names: Iterable[str], what: str) -> str:
    """Return the name if it is one of the names.

    Raises:
        ValueError: If not; the sentence offers the nearest.
    """
    names = list(names)
    if name not in names:
        raise ValueError(f"No {what} is called {name!r}{hint(name, names)} Known: {', '.join(names) or 'none'}.")
    return name


def hint(name: object, names: Iterable[str], prefix: str = "") -> str:
    """End a sentence with the name of most similar spelling, or with a full stop where none is similar."""
    found = difflib.get_close_matches(str(name), sorted(names), 1, 0.5)
    return f"; did you mean {prefix + found[0]!r}?" if found else "."
