"""Operations on rows of images that keep channels-last rows as they are, in backward too.

Torch's own gather, add and split along the first dimension to contiguous tensors: the next convolution converts these,
and to add channels-last rows to a contiguous tensor takes many times as long. Here the channels stand last meanwhile.
"""

from collections.abc import Callable, Sequence

from jaxtyping import Float
from torch import Tensor


def in_memory_format(
    operation: Callable[..., Tensor], *rows: Float[Tensor, "_ *item"]
) -> Float[Tensor, "results *item"]:
    """Apply an operation along the first dimension, in the memory format of the first tensor.

    Args:
        operation: What takes the tensors and returns one, and does not care which of the further dimensions is which.
        rows: Tensors that differ in their first dimension only.
    """
    if not _is_channels_last(rows[0]):
        return operation(*rows)
    return operation(*(each.movedim(1, -1) for each in rows)).movedim(-1, 1)


def split_rows(rows: Float[Tensor, "rows *item"], lengths: Sequence[int]) -> list[Float[Tensor, "_ *item"]]:
    """Split along the first dimension, so that the gradient has the memory format of the rows."""
    if not _is_channels_last(rows):
        return list(rows.split(lengths))
    return [group.movedim(-1, 1) for group in rows.movedim(1, -1).split(lengths)]


def _is_channels_last(rows: Tensor) -> bool:
    return rows.dim() > 2 and not rows.is_contiguous() and rows.movedim(1, -1).is_contiguous()
