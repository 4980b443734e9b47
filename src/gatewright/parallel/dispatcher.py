"""Expert parallelism: a local dispatcher, and the trip to the processes that hold the experts and back."""

from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.distributed import ProcessGroup

from gatewright.dispatch import Dispatcher, ExpertBatch
from gatewright.parallel.collectives import Travel, all_to_all, gather_counts, start_all_to_all
from gatewright.routing import Routing


@dataclass(frozen=True)
class Trip:
    """Who sends how many rows to whom.

    Args:
        sent: Rows that this rank sends to each rank.
        received: Rows that it gets from each.
        order: Place, among the rows that arrived, of each row in the order of the experts.
        rows_per_rank: Rows that each rank's experts get.
    """

    sent: list[int]
    received: list[int]
    order: Int[Tensor, " received"]
    rows_per_rank: list[int]


@dataclass(frozen=True)
class TravellingBatch(ExpertBatch):
    """Rows that come to this process's experts from all processes, by a trip and an exchange to wait for."""

    local: ExpertBatch
    trip: Trip
    travel: Travel


class ExpertParallel(Dispatcher):
    """Wraps a local dispatcher: rows travel to the rank that holds their expert, and their outputs back.

    The layer and the experts do not know. Ranks hold runs of experts, in rank order, which may differ in length.

    Args:
        local: Groups rows by expert, and drops what exceeds a capacity, on this process.
        group: Processes that hold all experts between them.
        num_experts: Number of experts on all of them.

    Attributes:
        bytes_sent: Bytes sent to other processes so far: rows, their outputs and, in training, the gradients of both.
    """

    def __init__(self, local: Dispatcher, group: ProcessGroup, num_experts: int) -> None:
        self.local, self.group, self.num_experts = local, group, num_experts
        self.bytes_sent = 0

    def dispatch(self, x: Float[Tensor, "tokens *item"], routing: Routing, *, training: bool) -> TravellingBatch:
        """Group rows by expert and begin to send them."""
        local = self.local.dispatch(x, routing, training=training)
        counts = gather_counts(local.tokens_per_expert, self.group)
        trip = self._trip(counts)
        rows = local.rows[: sum(trip.sent)]
        arriving, travel = start_all_to_all(rows, trip.sent, trip.received, self.group)
        self._count_both_ways(rows, trip.sent, arriving, trip.received)
        own = expert_runs(self.num_experts, self.group.size())[self.group.rank()]
        tokens_per_expert = counts[:, own.start : own.stop].sum(0)
        return TravellingBatch(arriving, tokens_per_expert, local.routing, local, trip, travel)

    def arrive(self, batch: ExpertBatch) -> ExpertBatch:
        """Wait for the rows, and group them by expert."""
        assert isinstance(batch, TravellingBatch)
        batch.travel.wait()
        return replace(batch, rows=batch.rows.index_select(0, batch.trip.order))

    def combine(
        self, rows: Float[Tensor, "assignments *out"], batch: ExpertBatch, num_tokens: int
    ) -> Float[Tensor, "num_tokens *out"]:
        """Send outputs back to where their tokens are, and add them up there."""
        assert isinstance(batch, TravellingBatch)
        rows = rows.to(self._agreed_dtype(rows, batch.trip))
        back = torch.empty_like(rows).index_copy(0, batch.trip.order, rows)
        returned = self._send(back, batch.trip.received, batch.trip.sent)
        dropped = returned.new_zeros(len(batch.local.rows) - len(returned), *returned.shape[1:])
        return self.local.combine(torch.cat([returned, dropped]), batch.local, num_tokens)

    def _trip(self, counts: Int[Tensor, "ranks experts"]) -> Trip:
        runs = expert_runs(self.num_experts, self.group.size())
        table = torch.stack([counts[:, run.start : run.stop].sum(1) for run in runs], 1)  # from rank, to rank
        rank = self.group.rank()
        own = counts[:, runs[rank].start : runs[rank].stop]
        expert = torch.arange(own.shape[1], device=own.device).repeat(len(runs)).repeat_interleave(own.flatten())
        return Trip(table[rank].tolist(), table[:, rank].tolist(), expert.argsort(stable=True), table.sum(0).tolist())

    def _send(self, rows: Tensor, sent: list[int], received: list[int]) -> Tensor:
        arrived = all_to_all(rows, sent, received, self.group)
        self._count_both_ways(rows, sent, arrived, received)
        return arrived

    def _count_both_ways(self, rows: Tensor, sent: list[int], arrived: Tensor, received: list[int]) -> None:
        """Count what is sent now, and in backward, where gradients go back to where the rows came from."""
        self._count(sent, rows)
        if arrived.requires_grad:
            arrived.register_hook(partial(self._count, received))

    def _count(self, sent: list[int], rows: Tensor) -> None:
        away = sum(sent) - sent[self.group.rank()]
        self.bytes_sent += away * rows[:1].nbytes if away else 0

    def _agreed_dtype(self, rows: Tensor, trip: Trip) -> torch.dtype:
        """Learn from the others what experts return under autocast, where some rank's experts had no rows."""
        if all(trip.rows_per_rank):
            return rows.dtype
        known = torch.tensor([_DTYPES.index(rows.dtype) if len(rows) else -1], device=rows.device)
        found = int(gather_counts(known, self.group).max())
        return _DTYPES[found] if found >= 0 else rows.dtype

    def __deepcopy__(self, memo: dict[int, object]) -> "ExpertParallel":
        """A copy of a model belongs to the same processes."""
        return ExpertParallel(self.local, self.group, self.num_experts)

    def __repr__(self) -> str:
        """Show the local dispatcher and the number of processes when a layer is printed."""
        return f"ExpertParallel({self.local}, ranks={self.group.size()})"


_DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def expert_runs(num_experts: int, ep_size: int) -> list[range]:
    """Share experts out in runs, in rank order; the first ranks get one more where they do not come out even."""
    least, more = divmod(num_experts, ep_size)
    ends = [rank * least + min(rank, more) for rank in range(ep_size + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]
