"""Which text to load, how to split it and how to batch it."""

from pathlib import Path
from typing import Annotated

from pydantic import Field, PositiveInt

from gatewright.data.config import BatchConfig, check_data_name
from gatewright.settings import settings

BUILT_IN_TEXTS = ("python", "text")


@settings("data")
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
    context: PositiveInt = 256
    batch_size: PositiveInt = 32
    eval_batch_size: PositiveInt = 64
    epoch_batches: PositiveInt | None = None
    holdout: Annotated[float, Field(ge=0, lt=1)] = 0.005
    cache: str | None = None

    def __post_init__(self) -> None:
        check_data_name(self.name, BUILT_IN_TEXTS)
        if (self.name == "text") > (self.path is not None) or (self.name == "python" and self.path is not None):
            raise ValueError(
                f"`data.path` names the file or folder of `data.name=text`, and `data.name=python` has none; got "
                f"the name {self.name!r} and the path {self.path!r}."
            )
        if self.column is not None and self.name in BUILT_IN_TEXTS:
            raise ValueError(
                f"`data.column` is for a Hugging Face data set; got {self.column!r} with the name {self.name!r}."
            )

    @property
    def source(self) -> str:
        """Origin of the text: a file or a folder, the standard library, or the hub."""
        if self.path is not None:
            return str(Path(self.path).expanduser().resolve())
        return "Python's standard library" if self.name == "python" else "Hugging Face hub"

    @property
    def items_per_batch(self) -> int:
        """Bytes of a training batch without padding."""
        return self.batch_size * self.context
