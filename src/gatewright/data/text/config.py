"""Which text to load, how to split it and how to batch it."""

import re
from dataclasses import dataclass

from gatewright.data.config import BatchConfig
from gatewright.names import hint

BUILT_IN_TEXTS = ("python", "text")


@dataclass(frozen=True, kw_only=True)
class TextConfig(BatchConfig):
    """A text data set and how training reads it. A token is a byte.

    Args:
        name: ``"python"`` for the sources of the installed Python's own standard library; ``"text"`` for a file or a
            folder of text files; or a Hugging Face data set such as ``"owner/name"``.
        path: The text file or folder; for a Hugging Face data set, a folder of parquet files in its schema.
        column: The column of a Hugging Face data set that holds the text; None takes its only column of strings.
        context: Bytes of a training window, which is as far as the model looks back.
        batch_size: Windows per training batch.
        eval_batch_size: Windows per evaluation batch.
        epoch_batches: Training batches of an epoch; None takes the whole text. Epochs of a fixed length go on through
            the text where the last one stopped.
        holdout: Share of the training documents that are held out for choosing settings, in [0, 1), where the data set
            has no validation split of its own.
        cache: Folder for prepared text; by default ``$GATEWRIGHT_CACHE``, or else ``~/.cache/gatewright``.

    Raises:
        ValueError: If a setting is out of range, or the text to load is unknown.
    """

    name: str = "python"
    path: str | None = None
    column: str | None = None
    context: int = 256
    batch_size: int = 32
    eval_batch_size: int = 64
    epoch_batches: int | None = None
    holdout: float = 0.005
    cache: str | None = None

    def __post_init__(self) -> None:
        if self.name not in BUILT_IN_TEXTS and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", self.name):
            known = ", ".join(BUILT_IN_TEXTS)
            raise ValueError(f"name is {known} or owner/name; got {self.name!r}{hint(self.name, BUILT_IN_TEXTS)}")
        if (self.name == "text") > (self.path is not None) or (self.name == "python" and self.path is not None):
            raise ValueError(
                f"path names the file or folder of name='text', and name='python' has none; got name={self.name!r} and "
                f"path={self.path!r}."
            )
        if self.column is not None and self.name in BUILT_IN_TEXTS:
            raise ValueError(f"column is one of a Hugging Face data set; got {self.column!r} with name={self.name!r}.")
        if not 0 <= self.holdout < 1:
            raise ValueError(f"holdout is a share of the training documents in [0, 1); got {self.holdout}.")
        if self.context < 1 or (self.epoch_batches is not None and self.epoch_batches < 1):
            raise ValueError(
                "context and epoch_batches are at least 1, or epoch_batches None for the whole text; got "
                f"{self.context} and {self.epoch_batches}."
            )
        super().__post_init__()
