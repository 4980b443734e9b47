"""One process against several, as a table: ``python -m studies.parallel_parity`` in the repository's root.

For every router and two kinds of experts: the largest difference of outputs, gradients (with their norm) and auxiliary
losses over 2 and 4 gloo processes, in units of the largest entry expected; the largest difference of reported losses,
gradient norms and final weights of 20 steps in float64, by DDP and by FSDP2; of weights after 12 steps in float32 by
DeepSpeed, beside the torch engine's. Then other optimizers and layouts in float64; float32 beside the difference that
a permutation of each batch's rows makes on one process; and runs that go on at another number of processes. Names of
routers as arguments print the lines of these alone.
"""

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from tests.cases import NUM_EXPERTS, ROUTER_CASES, SOFT_CASES
from tests.integrations.deepspeed import test_engine as deepspeeds
from tests.parallel import parity
from tests.ranks import Ranks
from tests.train.checkpoint.test_writer import resharded, save_midway, uninterrupted
from tests.train.spread import largest_difference
from tests.train.strategies.test_strategies import in_float32, trajectory

LAYOUTS = [(2, 1), (2, 2), (4, 2), (4, 4)]
EXPERTS = ["modules-different", "grouped-relu-bias"]
CUT = {"soft-groups"}  # The parts that processes have of a batch in these runs are no whole groups.
ENGINES = {
    "DDP, AdamW": {"experts": "modules-different"},
    "DDP, SGD": {"experts": "grouped-relu-bias", "optimizer": "sgd"},
    "DDP, Muon": {"router": "top-k", "experts": "grouped-relu-bias", "optimizer": "muon"},
    "DDP, averaged weights": {"ema_decay": 0.9},
    "DDP, upcycled": {"upcycle_at": 10},
    "DDP, BatchNorm in experts": {"experts": "normalized"},
    "FSDP2, AdamW": {"experts": "modules-different", "shard": "fsdp"},
    "FSDP2, SGD": {"experts": "grouped-relu-bias", "optimizer": "sgd", "shard": "fsdp"},
    "FSDP2, BatchNorm in experts": {"experts": "normalized", "shard": "fsdp"},
}
SIZES = [(4, 4, 1), (4, 4, 2), (4, 4, 3), (4, 4, 8), (4, 2, 1), (2, 2, 4), (1, 1, 4)]  # from, its ep size, to


def worst(results: list[dict[str, float]], names: tuple[str, ...]) -> float:
    """Return the largest of some differences over ranks and layouts."""
    return max(result[name] for result in results for name in names)


def router_table(ranks: Callable[..., list[Any]], routers: list[str]) -> None:
    """Print one line per router and kind of experts: one layer, then trajectories on three engines."""
    print("| router | experts | output, gradients, auxiliary; float32 | the same; float64 | DDP | FSDP2 | DeepSpeed |")
    print("|---|---|---|---|---|---|---|")
    for router in routers:
        for experts in EXPERTS:
            cells = [one_layer(ranks, router, experts, dtype) for dtype in (torch.float32, torch.float64)]
            cells += ["cut"] * 3 if router in CUT else trajectories(ranks, router, experts)
            print(f"| {router} | {experts} | {' | '.join(cells)} |", flush=True)


def trajectories(ranks: Callable[..., list[Any]], router: str, experts: str) -> list[str]:
    """Return the largest differences of runs by DDP, by FSDP2 and by DeepSpeed."""
    cells = []
    for shard in ("none", "fsdp"):
        options = {"router": router, "experts": experts, "shard": shard}
        found = [max(twenty_steps(ranks, world, ep_size, options)) for world, ep_size in LAYOUTS[1:]]
        cells.append(f"{max(found):.0e}")
    return [*cells, by_deepspeed(ranks, router, experts)]


def twenty_steps(
    ranks: Callable[..., list[Any]], world: int, ep_size: int, options: dict[str, Any]
) -> tuple[float, float]:
    """Return the largest difference of what any process reported from one process's run, and that of the weights."""
    options = {"shard": "none", **options}
    shard = options.pop("shard")
    (first, expected, weights), *others = ranks(world, trajectory, ep_size, options, shard)
    reports = torch.tensor([first, *(reports for (reports,) in others)]) - torch.tensor(expected)
    return float(reports.abs().max()), weights


def one_layer(ranks: Callable[..., list[Any]], router: str, experts: str, dtype: torch.dtype) -> str:
    """Return the largest differences over all layouts."""
    results = []
    for world, ep_size in LAYOUTS:
        if router in SOFT_CASES:
            results += ranks(world, parity.soft, router, experts, dtype, ep_size)
        else:
            results += ranks(world, parity.layer, router, experts, dtype, NUM_EXPERTS, 13, ep_size)
    return ", ".join(f"{worst(results, names):.0e}" for names in (("output",), ("gradient", "norm"), ("auxiliary",)))


def by_deepspeed(ranks: Callable[..., list[Any]], router: str, experts: str) -> str:
    """Return how far DeepSpeed is from float64 after 12 steps in float32, and in brackets how far torch's engine is."""
    kind = "modules" if experts.startswith("modules") else experts
    arguments = (2, deepspeeds.ADAMW, None, tempfile.mkdtemp(), kind, router)
    found = ranks(2, deepspeeds.trajectory_with, *arguments)
    plain, theirs = (max(pair[place]["weights"] for pair in found) for place in (0, 1))
    return f"{theirs:.0e} ({plain:.0e})"


def trajectory_table(ranks: Callable[..., list[Any]]) -> None:
    """Print one line per engine and layout, in float64."""
    print("\n| engine | processes | ep_size | losses and gradient norms | weights after 20 steps |")
    print("|---|---|---|---|---|")
    for engine, options in ENGINES.items():
        for world, ep_size in LAYOUTS:
            reports, weights = twenty_steps(ranks, world, ep_size, options)
            print(f"| {engine} | {world} | {ep_size} | {reports:.0e} | {weights:.0e} |")


def float32_table(ranks: Callable[..., list[Any]]) -> None:
    """Print one line per engine, optimizer and normalisation, in float32."""
    print("\n| engine | optimizer | normalisation | weights after 20 steps, 4 processes | rows permuted, one process |")
    print("|---|---|---|---|---|")
    for shard in ("none", "fsdp"):
        for optimizer in ("adamw", "sgd"):
            for norm in (nn.LayerNorm, nn.BatchNorm1d):
                spread, permuted = ranks(4, in_float32, 2, shard, norm, optimizer)[0]
                engine = "FSDP2" if shard == "fsdp" else "DDP"
                print(f"| {engine} | {optimizer} | {norm.__name__} | {spread:.0e} | {permuted:.0e} |")


def resharding_table(ranks: Callable[..., list[Any]]) -> None:
    """Print one line per pair of sizes: weights after 20 further steps, beside a run on one process that never stopped.

    At 8 processes, and sharded, experts have two copies each; else every process has experts of its own.
    """
    print("\n| saved by | goes on at | modules, AdamW | modules, SGD | grouped, AdamW | grouped, SGD |")
    print("|---|---|---|---|---|---|")
    cases = [
        {"experts": experts, "optimizer": optimizer}
        for experts in ("modules", "grouped-relu-bias")
        for optimizer in ("adamw", "sgd")
    ]
    for before, after in (("none", "none"), ("fsdp", "none"), ("none", "fsdp")):
        for world, ep_size, to in SIZES if before == after else [(4, 2, 1 if before == "fsdp" else 4)]:
            first, then = _layout(world, ep_size, before), _layout(to, _ep_size(to, after), after)
            found = [_resharded(ranks, (world, ep_size, before), (to, after), options) for options in cases]
            print(f"| {first} | {then} | {' | '.join(f'{difference:.0e}' for difference in found)} |", flush=True)


def _resharded(
    ranks: Callable[..., list[Any]], saved: tuple[int, int, str], then: tuple[int, str], options: dict[str, Any]
) -> float:
    folder, (world, ep_size, before), (to, after) = Path(tempfile.mkdtemp()), saved, then
    if world == 1:
        save_midway(folder, None, options)
    else:
        ranks(world, save_midway, folder, ep_size, options, before)
    if to == 1:
        found = resharded(folder, None, options)
    else:
        found = ranks(to, resharded, folder, _ep_size(to, after), options, after)[0]
    return largest_difference(found, uninterrupted(options))


def _ep_size(processes: int, shard: str) -> int:
    return processes // 2 if processes == 8 or shard == "fsdp" else processes


def _layout(processes: int, ep_size: int, shard: str) -> str:
    if processes == 1:
        return "1"
    return f"{processes}, ep size {ep_size}" + (", FSDP2" if shard == "fsdp" else "")


def main(routers: list[str]) -> None:
    """Print all tables, or the lines of some routers."""
    print(f"torch {torch.__version__}, gloo on CPU\n")
    ranks = Ranks(Path(tempfile.mkdtemp()))
    router_table(ranks.run, routers or [*ROUTER_CASES, *SOFT_CASES])
    if not routers:
        trajectory_table(ranks.run)
        float32_table(ranks.run)
        resharding_table(ranks.run)
    ranks.close()


if __name__ == "__main__":
    main(sys.argv[1:])
