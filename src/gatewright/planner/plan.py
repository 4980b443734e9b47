"""The needs of a training step: memory, bytes and seconds per process, predicted from sizes alone.

The cost model of docs/plan.md. Nothing here starts a process or makes a tensor. Weights, gradients, optimizer state and
bytes follow from the sizes exactly; activations, time and efficiency are estimates.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from gatewright.parallel.apply import check_ep_size
from gatewright.planner.cost import Links, all_reduce_bytes, all_reduce_seconds, all_to_all_seconds, random_imbalance
from gatewright.planner.sizes import Sizes

MOST_PROCESSES = 65_536


@dataclass(frozen=True, kw_only=True)
class Device:
    """The device of one process.

    Args:
        flops: Peak arithmetic per second.
        efficiency: Share of it that large matrix products reach.
        memory_bandwidth: Bytes per second, which the optimizer's update waits for; infinite counts no time for it.
        launch: Seconds that Python and PyTorch take to start one operation. The default was measured on one core of an
            Intel Xeon, where training steps of small mixtures took 8 to 11 us per operation (docs/plan.md).
    """

    flops: float = 989e12
    efficiency: float = 0.5
    memory_bandwidth: float = math.inf
    launch: float = 8e-6

    def __post_init__(self) -> None:
        if min(self.flops, self.memory_bandwidth) <= 0 or not 0 < self.efficiency <= 1 or self.launch < 0:
            raise ValueError(
                f"A device has flops and memory_bandwidth above 0, an efficiency in (0, 1] and a launch time that is "
                f"not negative; got {self.flops}, {self.memory_bandwidth}, {self.efficiency} and {self.launch}. "
                "Give flops as the device's peak."
            )


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on the process that has the most experts and the most rows."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All four."""
        return self.weights + self.gradients + self.optimizer + self.activations


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """Bytes that one process sends in a step.

    Args:
        all_to_all: Rows and their gradients, in expectation over uniform routing.
        dense_reduced: Gradients outside of experts, which all processes add up.
        dense_reduction: Bytes that each process sends for that.
        expert_reduced: Gradients of this process's experts, which those that hold the same add up.
        expert_reduction: Bytes that each process sends for that.
    """

    all_to_all: float
    dense_reduced: float
    dense_reduction: float
    expert_reduced: float
    expert_reduction: float

    @property
    def total(self) -> float:
        """All three kinds of bytes that are sent."""
        return self.all_to_all + self.dense_reduction + self.expert_reduction


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """The parts of a step's time.

    Args:
        compute: Forward and backward, on the process with the most rows: arithmetic, or `launch` where that is more.
        launch: Starting the step's operations, one after another, however small they are.
        all_to_all: Rows and their gradients on their way.
        reduction: Reductions of gradients.
        update: The optimizer's update, which reads and writes every parameter.
        step: The whole step; the all-to-all behind the computing where they overlap.
        ideal: The same computing, evenly spread, without anything else.
    """

    compute: float
    launch: float
    all_to_all: float
    reduction: float
    update: float
    step: float
    ideal: float

    @property
    def efficiency(self) -> float:
        """Share of the step in which there would be something to do if computing were all."""
        return self.ideal / self.step if self.step else 1.0


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The prediction for one process of so many."""

    processes: int
    ep_size: int
    imbalance: float
    memory: Memory
    traffic: Traffic
    seconds: Seconds


def plan(
    sizes: Sizes,
    processes: int,
    ep_size: int,
    *,
    links: Links | None = None,
    device: Device | None = None,
    imbalance: float | None = None,
    overlap: bool = False,
) -> Plan:
    """Predict what each process of a run needs.

    Args:
        sizes: The model and its batch.
        processes: Number of processes.
        ep_size: Processes that share the experts of a layer out among them.
        links: The links between processes; None takes the defaults of `Links`.
        device: The device of each process; None takes the defaults of `Device`.
        imbalance: Rows of the busiest process over their mean; None takes what random routing leaves.
        overlap: Whether tokens travel while others are computed.

    Raises:
        ValueError: If the sizes do not fit the processes.
    """
    check_ep_size(ep_size, processes)
    if (sizes.layers and ep_size > sizes.num_experts) or processes > sizes.items:
        raise ValueError(
            f"Each process has at least one expert and one item; got {processes} processes and ep_size {ep_size} for "
            f"{sizes.num_experts} experts and {sizes.items} items. Use fewer processes, or more experts or items."
        )
    if imbalance is not None and not 1 <= imbalance <= ep_size:
        raise ValueError(
            f"imbalance is the largest load of a process over the mean, between 1 and ep_size ({ep_size}), where one "
            f"process has all rows; got {imbalance}. Leave it out for that of random routing."
        )
    rho = process_imbalance(sizes, processes, ep_size) if imbalance is None else imbalance
    traffic = predict_traffic(sizes, processes, ep_size)
    seconds = _seconds(sizes, processes, ep_size, rho, links or Links(), device or Device(), overlap)
    memory = predict_memory(sizes, processes, ep_size, rho)
    return Plan(processes=processes, ep_size=ep_size, imbalance=rho, memory=memory, traffic=traffic, seconds=seconds)


def process_imbalance(sizes: Sizes, processes: int, ep_size: int) -> float:
    """Return the busiest process's rows over the mean under random routing, at most all of them."""
    rows = sizes.tokens / processes * sizes.top_k
    return min(random_imbalance(ep_size, rows), ep_size) if sizes.layers else 1.0


def predict_memory(sizes: Sizes, processes: int, ep_size: int, imbalance: float) -> Memory:
    """Add up what the process with the most experts and rows keeps, without buffers that live within one operation.

    Activations are what autograd saves for backward: ``T/W`` tokens of the dense part, ``rho T k / W`` rows of experts;
    of those that travelled, also each output with its place, which are put in order before they go back.
    """
    here = local_experts(sizes, ep_size)
    parameters = sizes.dense.parameters + here * sizes.expert.parameters
    state = sizes.dense.state + here * sizes.expert.state
    tokens = math.ceil(sizes.tokens / processes)
    rows = sizes.layers * tokens * sizes.top_k
    travelled = sizes.returned_bytes + 8 if ep_size > 1 else 0
    per_row = imbalance * (sizes.expert.saved + travelled) + sizes.kept_bytes
    saved = tokens * sizes.dense.saved + rows * per_row
    return Memory(
        weights=parameters * sizes.number_bytes,
        gradients=parameters * sizes.number_bytes,
        optimizer=state * sizes.number_bytes,
        activations=saved + sizes.dense.fixed + here * sizes.expert.fixed,
    )


def local_experts(sizes: Sizes, ep_size: int) -> int:
    """Return how many experts, over all layers, a process holds; the most that any does."""
    return sizes.layers * math.ceil(sizes.num_experts / ep_size)


def predict_traffic(sizes: Sizes, processes: int, ep_size: int) -> Traffic:
    """Count the bytes that a process sends in one step: ``T k d b (1 - 1/W)`` per pass, and what reductions take."""
    away = sizes.tokens / processes * sizes.top_k * (1 - 1 / ep_size)
    dense = sizes.dense.parameters * sizes.number_bytes if processes > 1 else 0
    replicas = processes // ep_size
    experts = local_experts(sizes, ep_size) * sizes.expert.parameters * sizes.number_bytes if replicas > 1 else 0
    return Traffic(
        all_to_all=sizes.layers * away * sum(_passes(sizes)),
        dense_reduced=dense,
        dense_reduction=all_reduce_bytes(dense, processes),
        expert_reduced=experts,
        expert_reduction=all_reduce_bytes(experts, replicas),
    )


def _seconds(
    sizes: Sizes, processes: int, ep_size: int, rho: float, links: Links, device: Device, overlap: bool
) -> Seconds:
    tokens, rate = sizes.tokens / processes, device.efficiency * device.flops
    dense = 3 * sizes.dense.flops * tokens / rate  # Backward is two products for each of forward's.
    experts = 3 * sizes.layers * sizes.expert.flops * tokens * sizes.top_k / rate
    trips = (all_to_all_seconds(tokens, sizes.top_k, row, ep_size, links) for row in _passes(sizes))
    travel = sizes.layers * sum(trips)
    traffic, replicas = predict_traffic(sizes, processes, ep_size), processes // ep_size
    reduction = all_reduce_seconds(traffic.dense_reduced, processes, links)
    reduction += all_reduce_seconds(traffic.expert_reduced, replicas, links, stride=ep_size)
    # Backward and the update together start about as many operations as forward does, or more.
    launch = 2 * device.launch * (sizes.dense.operations + local_experts(sizes, ep_size) * sizes.expert.operations)
    compute, update = max(dense + rho * experts, launch), _touched(sizes, ep_size) / device.memory_bandwidth
    busy = max(compute, travel) if overlap else compute + travel
    return Seconds(
        compute=compute,
        launch=launch,
        all_to_all=travel,
        reduction=reduction,
        update=update,
        step=busy + reduction + update,
        ideal=dense + experts,
    )


def _passes(sizes: Sizes) -> list[int]:
    """Bytes per row of each trip of a training step: there, back, and their gradients."""
    return [sizes.sent_bytes, sizes.returned_bytes, sizes.returned_bytes, sizes.sent_bytes * sizes.item_gradient]


def _touched(sizes: Sizes, ep_size: int) -> float:
    """Bytes that an update reads and writes: weights and state both, gradients read; 28 per parameter for AdamW."""
    memory = predict_memory(sizes, 1, ep_size, 1.0)
    return 2 * memory.weights + memory.gradients + 2 * memory.optimizer


def smallest(
    sizes: Sizes, memory_per_rank: float, *, ranks_per_node: int = 1, imbalance: float | None = None
) -> tuple[int, int]:
    """Find the fewest processes on which a step fits, and the smallest ep size with which it does.

    Above one node, only whole nodes count.

    Args:
        sizes: The model and its batch, which stays the same however many processes share it.
        memory_per_rank: Bytes that each process has.
        ranks_per_node: Processes of one node.
        imbalance: The imbalance, as in `plan`; at most the ep size.

    Raises:
        ValueError: If it fits on no number of processes that the items can be spread over.
    """
    least, most = math.inf, min(sizes.items, MOST_PROCESSES)
    for processes in _worlds(most, ranks_per_node):
        for ep_size in _divisors(processes, sizes.num_experts if sizes.layers else 1):
            random = process_imbalance(sizes, processes, ep_size)
            rho = random if imbalance is None else min(imbalance, ep_size)
            needed = predict_memory(sizes, processes, ep_size, rho).total
            if needed <= memory_per_rank:
                return processes, ep_size
            least = min(least, needed)
    raise ValueError(
        f"No number of processes up to {most} (one item each) fits in "
        f"{memory_per_rank:.4g} bytes each: the least is {least:.4g}, for what every process has a copy of, one expert "
        "per layer and its share of the tokens. Use more memory per process, smaller experts or a smaller dense part."
    )


def _worlds(most: int, ranks_per_node: int) -> Iterator[int]:
    yield from range(1, min(ranks_per_node, most) + 1)
    yield from range(2 * ranks_per_node, most + 1, ranks_per_node)


def _divisors(number: int, most: int) -> list[int]:
    low = [size for size in range(1, math.isqrt(number) + 1) if number % size == 0]
    return [size for size in sorted({*low, *(number // size for size in low)}) if size <= most]
