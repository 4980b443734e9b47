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
        nearest = difflib.get_close_matches(name, names, 1, 0.0)
        hint = f"; did you mean {nearest[0]!r}?" if nearest else "."
        raise ValueError(f"No {what} is called {name!r}{hint} Known: {', '.join(names) or 'none'}.")
    return name
