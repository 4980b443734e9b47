"""What checks the package's annotations, shapes included, while tests run: beartype, as mypy would read it."""

from beartype import BeartypeConf, beartype
from beartype.roar import BeartypeDecorHintPep673Exception


def check(function):
    """Check a function's calls; an int passes for a float, and a method that says `Self` is left alone."""
    try:
        return beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
    except BeartypeDecorHintPep673Exception:  # beartype knows Self only where it decorates the whole class.
        return function
