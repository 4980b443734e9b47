"""What the data of every task have: the sizes of their batches."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class BatchConfig:
    """How many items a batch has.

    Attributes:
        batch_size: items per training batch, on all processes together, 1 or more.
        eval_batch_size: items per evaluation batch, 1 or more.

    Raises:
        ValueError: a size is less than 1.
    """

    batch_size: int = 128
    eval_batch_size: int = 1000

    def __post_init__(self) -> None:
        for setting in ("batch_size", "eval_batch_size"):
            value = getattr(self, setting)
            if value < 1:
                raise ValueError(f"{setting} must be 1 or more; got {value}")
