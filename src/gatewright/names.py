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
        hint = f"; did you mean {nearest(name, names)!r}?" if names else "."
        raise ValueError(f"No {what} is called {name!r}{hint} Known: {', '.join(names) or 'none'}.")
    return name


def nearest(name: object, names: Iterable[str]) -> str:
    """Return the name of most similar spelling, however far it is; there is at least one."""
    return difflib.get_close_matches(str(name), sorted(names), 1, 0.0)[0]
