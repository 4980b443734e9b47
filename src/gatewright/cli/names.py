"""Names that a person types."""

import difflib
from collections.abc import Iterable


def known(name: str, names: Iterable[str], what: str) -> str:
    """Return the name if it is one of the names.

    Raises:
        ValueError: If not; the sentence offers the nearest.
    """
    names = list(names)
    if name not in names:
        nearest = difflib.get_close_matches(name, names, 1, 0.0)[0]
        raise ValueError(f"No {what} is called {name!r}; did you mean {nearest!r}? Known: {', '.join(names)}.")
    return name
