"""What every kind of experts is: a module that turns an `ExpertBatch` into one output row per row."""

from abc import ABC, abstractmethod

from jaxtyping import Float, Int
from torch import Tensor, nn

Shape = tuple[int, ...]


class Experts(nn.Module, ABC):
    """A number of experts, each mapping items of one shape to outputs of one shape."""

    num_experts: int

    @abstractmethod
    def output_shape(self, item_shape: Shape) -> Shape:
        """Return the shape of one output for items of a shape, without computing anything.

        Raises:
            ValueError: If the experts do not take such items, or their output shapes differ.
        """

    @abstractmethod
    def forward(
        self, rows: Float[Tensor, "assignments *item"], tokens_per_expert: Int[Tensor, " experts"]
    ) -> Float[Tensor, "assignments *out"]:
        """Run each expert on its group of rows; rows past the last group give zeros.

        An expert without rows is not called: its gradient is zero, never None, and its buffers do not change.
        """
