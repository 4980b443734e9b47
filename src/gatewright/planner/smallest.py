"""How many processes at least: the search over plans."""

import math
from collections.abc import Iterator

from gatewright.planner.plan import predict_memory, process_imbalance
from gatewright.planner.sizes import Sizes

MOST_PROCESSES = 65_536


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
