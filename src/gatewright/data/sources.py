"""Where the splits of a data set lie: what their folders and files are called, and what is no data at all."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

SPLIT_NAMES: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "train": ("train", "training"),
        "holdout": ("val", "valid", "validation", "dev"),
        "test": ("test", "testing", "eval", "evaluation"),
    }
)
"""What folders and files of each split are called, in upper or lower case: the names that `datasets` knows too."""

SPLITS = tuple(SPLIT_NAMES)


@dataclass(frozen=True)
class SplitFiles:
    """The files that hold each split, in the order in which they are read; a split may have none."""

    train: Sequence[Path]
    holdout: Sequence[Path] = ()
    test: Sequence[Path] = ()

    @property
    def files(self) -> list[Path]:
        """All files, split after split."""
        return [*self.train, *self.holdout, *self.test]


def split_of(name: str) -> str | None:
    """Return the split that a folder is named after, or None."""
    return next((split for split, names in SPLIT_NAMES.items() if name.lower() in names), None)


def is_hidden(name: str) -> bool:
    """Tell what no user means as data, such as `._0.png`, `.ipynb_checkpoints` and `__MACOSX`."""
    return name.startswith((".", "__"))
