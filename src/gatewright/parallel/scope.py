"""The scope of a batch that is spread over processes."""

import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from gatewright.parallel.collectives import all_gather, all_reduce, gather_counts
from gatewright.scope import BatchScope


class ProcessScope(BatchScope):
    """The processes of a group have one batch between them, each its own run of tokens, in rank order.

    Args:
        group: The processes.
        key: The key, as in `BatchScope`; where there is none, the first process draws one for all.
        device: The device that counts are on when they travel, which the group's backend decides.
    """

    def __init__(self, group: ProcessGroup, key: Int[Tensor, ""] | None = None, *, device: str = "cpu") -> None:
        super().__init__(key)
        self.group, self.device = group, device

    def token_offset(self, num_tokens: int | Int[Tensor, ""]) -> int:
        """Return how many tokens the processes before this one have."""
        counts = gather_counts(torch.as_tensor(num_tokens, device=self.device).view(1), self.group)
        return int(counts[: self.group.rank()].sum())

    def sum(self, *values: Tensor) -> tuple[Tensor, ...]:
        """Add up each tensor over the processes, in one reduction, with a gradient; counts travel as float64, exact."""
        wide = not all(value.is_floating_point() for value in values)
        flat = torch.cat([value.reshape(-1).to(torch.float64 if wide else value.dtype) for value in values])
        parts = all_reduce(flat, self.group).split([value.numel() for value in values])
        return tuple(part.view_as(value).to(value.dtype) for part, value in zip(parts, values, strict=True))

    def gather(self, values: Float[Tensor, "tokens *item"]) -> Float[Tensor, "global_tokens *item"]:
        """Concatenate over the processes in rank order, with a gradient."""
        return all_gather(values, self.group)

    def draw_key(self, device: torch.device) -> Int[Tensor, ""]:
        """Draw a key on the first process and tell the others."""
        key = super().draw_key(device)
        dist.broadcast(key, group=self.group, group_src=0)
        return key

    def __deepcopy__(self, memo: dict[int, object]) -> "ProcessScope":
        """A copy of a model belongs to the same processes, and draws noise of its own."""
        return ProcessScope(self.group, None if self.key is None else self.key.clone(), device=self.device)
