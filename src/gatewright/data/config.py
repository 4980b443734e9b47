"""What the data of every task have: the sizes of their batches."""

import re
from collections.abc import Collection

from pydantic import PositiveInt

from gatewright.names import hint
from gatewright.settings import settings


@settings("data")
class BatchConfig:
    """How many items a batch has.

    Args:
        batch_size: Items per training batch, on all processes together, 1 or more.
        eval_batch_size: Items per evaluation batch, 1 or more.

    Raises:
        ValueError: If a size is less than 1.
    """

    batch_size: PositiveInt = 128
    eval_batch_size: PositiveInt = 1000

    @property
    def items_per_batch(self) -> int:
        """How many items a full training batch has, as the task counts them."""
        return self.batch_size


def check_data_name(name: str, built_in: Collection[str]) -> None:
    """Refuse a name that is neither built in nor that of a Hugging Face data set.

    Raises:
        ValueError: If it is neither; the sentence offers the nearest.
    """
    if name not in built_in and not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name):
        raise ValueError(
            f"`data.name` is one of {', '.join(built_in)}, or the owner/name of a Hugging Face data set; got "
            f"{name!r}{hint(name, built_in)}"
        )
