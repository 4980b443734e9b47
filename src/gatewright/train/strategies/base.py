"""The processes of a run: what each does with its part of a batch, and what only the first one does.

Here is the interface, for a run on one process; `several.py` has DDP, `sharded.py` FSDP2.
"""

import contextlib
from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from gatewright.layers.base import aux_loss, moe_layers
from gatewright.parallel import Rows, whole_state
from gatewright.train.optim import clip_gradients


class WithLosses(nn.Module):
    """A network that returns its auxiliary loss beside its output, so that a wrapper round it sees both."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.has_losses = any(True for _ in moe_layers(network))

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output, and the sum of coefficients times auxiliary losses."""
        output = self.network(inputs)
        return output, aux_loss(self.network) if self.has_losses else output.new_zeros(())


class Processes:
    """A run on one process, which has the whole batch and everything else."""

    rank, world, local_rank = 0, 1, 0
    replicas = 1
    """How many processes hold the same expert."""

    def spread(self, model: nn.Module) -> nn.Module:
        """Give each process its part of the model, and keep the rest equal; return what is called in training."""
        return self.share_out(model)

    def share_out(self, model: nn.Module) -> nn.Module:
        """Give each process its part of the model; return what returns output and auxiliary loss."""
        return WithLosses(model)

    def share(self, count: int) -> slice:
        """Return which of a batch's items are this process's."""
        return slice(0, count)

    def accumulate(self, network: nn.Module, last: bool) -> contextlib.AbstractContextManager[object]:
        """Put off averaging gradients until the last micro-batch of a step."""
        return contextlib.nullcontext()

    def finish_gradients(self, model: nn.Module) -> None:
        """Make every gradient that of the mean loss over the global batch."""

    def clip(self, model: nn.Module, max_norm: float | None) -> Tensor:
        """Scale all gradients down to a total norm over all processes, and return the norm they had."""
        return clip_gradients(model, max_norm)

    def mean(self, value: Tensor) -> Tensor:
        """Average over the processes."""
        return value

    def sum(self, *tensors: Tensor) -> None:
        """Add up over the processes, in place."""

    def collect(self, values: list[float]) -> list[list[float]]:
        """Return the same numbers of every process."""
        return [values]

    def reduced(self, model: nn.Module) -> Iterable[nn.Parameter]:
        """Return the parameters whose gradients are summed with other processes'."""
        return ()

    def work_apart(self) -> None:
        """Make ready for a thread beside the training, which agrees with the others apart."""

    def agree(self, number: int | None, *, apart: bool = False) -> int | None:
        """Return the largest number that any process has; None where none has one."""
        return number

    def barrier(self) -> None:
        """Wait for every process."""

    def equalize(self, *models: nn.Module) -> None:
        """Give every copy of a BatchNorm the same statistics, before they are evaluated or saved."""

    def note(self, steps: int) -> None:
        """Let the others know how many optimizer steps this process has made."""

    def gather(self, tensors: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
        """Put together, on the first process, the state of what is spread over processes."""
        return tensors

    def part(self, tensors: dict[str, Tensor], model: nn.Module) -> Mapping[str, Tensor | Rows]:
        """Pick what this process is to save of a state."""
        return tensors

    def number_of_part(self, model: nn.Module) -> tuple[int | None, int]:
        """Return the number of the part that this process saves, None if it saves none, and how many there are."""
        return 0, 1

    def own(self, tensors: Mapping[str, Tensor | Rows], model: nn.Module) -> dict[str, Tensor]:
        """Pick what this process needs of a state that was gathered, or saved in parts."""
        return whole_state(tensors)


ALONE = Processes()
