"""Time a layer against its peers, case by case: ``python -m benchmarks --help``."""

import argparse
from functools import partial
from itertools import product
from typing import Any

import torch

from benchmarks.arms import BASELINES, OURS, dense, module_loop
from benchmarks.cases import CASES, QUICK, Case, make_items, make_weights
from benchmarks.command import chosen, parser
from benchmarks.compare import compare, say, since_start
from benchmarks.peers import CUDA_PEERS, PEERS
from benchmarks.profile import profile
from benchmarks.results import machine, record


def options() -> argparse.Namespace:
    """Read the command line."""
    flags = parser("benchmarks", __doc__, seconds=15.0)
    flags.add_argument("--dtype", nargs="*", help="by default float32 and bfloat16, and on CUDA bfloat16 alone")
    flags.add_argument("--budget", type=float, default=3600.0, help="seconds after which no case begins")
    flags.add_argument("--profile", action="store_true", help="where the time of our layer goes, and nothing else")
    flags.add_argument("--tiles", action="store_true", help="CUDA: also what other sizes of tiles would take")
    flags.add_argument("--compiled", action="store_true", help="CUDA: also what torch.compile makes of the layer")
    flags.add_argument("--anyway", action="store_true", help="CUDA: go on where the numbers of a kernel are wrong")
    return flags.parse_args()


def measure_layer(case: Case, dtype: torch.dtype, device: str, seconds: float) -> dict[str, Any]:
    """Check and time every arm of a case."""
    weights = make_weights(case, device, dtype)
    peers = PEERS if device == "cpu" else PEERS | CUDA_PEERS
    builds = {"dense": dense, **OURS, **BASELINES, **peers}
    arms = {name: partial(build, case, weights) for name, build in builds.items()}
    loop = module_loop(case, weights.double())
    return {"arms": compare(arms, loop, make_items(case, weights.gate), seconds)}


def fit_for_cuda(asked: argparse.Namespace) -> bool:
    """Check the kernels, and print what was asked for beside the layer; return whether the layer may be timed."""
    from benchmarks import cuda  # It needs Triton.

    if not cuda.parity_holds() and not asked.anyway:
        say("Parity does not hold: no speed counts.")
        return False
    if asked.tiles:
        cuda.time_tiles(asked.budget)
    if asked.compiled:
        cuda.time_compiled(asked.budget)
    return True


def main() -> None:
    """Measure what was asked for, as long as there is time."""
    asked = options()
    say(machine(asked.device))
    if asked.device == "cuda" and not fit_for_cuda(asked):
        return
    dtypes = asked.dtype or (["float32", "bfloat16"] if asked.device == "cpu" else ["bfloat16"])
    for case, dtype in product(chosen(asked, CASES[asked.device], QUICK), dtypes):
        if since_start() > asked.budget:
            say("Out of time before", case, dtype)
            return
        say(f"{case}, {dtype}")
        measured = profile if asked.profile else measure_layer
        found = measured(case, getattr(torch, dtype), asked.device, asked.seconds)
        section = "profile" if asked.profile else "layer"
        record(section, f"{case}, {dtype}", asked.device, {"case": str(case), "dtype": dtype, **found}, asked.output)


if __name__ == "__main__":
    main()
