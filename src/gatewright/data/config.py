"""What the data of every task have: the sizes of their batches."""

from pydantic import PositiveInt

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
