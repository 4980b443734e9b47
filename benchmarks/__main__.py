"""Time a layer against its peers, case by case: ``python -m benchmarks --help``."""

import argparse
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.arms import BASELINES, OURS, dense, module_loop
from benchmarks.cases import CASES, QUICK, Case, make_items, make_weights
from benchmarks.compare import compare, say, since_start
from benchmarks.peers import CUDA_PEERS, PEERS
from benchmarks.results import FOLDER, machine, record


def options() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=CASES, default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--case", type=int, nargs="*", help="numbers of cases; by default all, see benchmarks/cases.py")
    parser.add_argument("--dtype", nargs="*", help="by default float32 and bfloat16, and on CUDA bfloat16 alone")
    parser.add_argument("--seconds", type=float, default=15.0, help="how long to time one case in one dtype")
    parser.add_argument("--budget", type=float, default=3600.0, help="seconds after which no case begins")
    parser.add_argument("--quick", action="store_true", help="one tiny case, to see that everything runs")
    parser.add_argument("--output", type=Path, default=FOLDER, help="folder of the JSON files")
    parser.add_argument("--profile", action="store_true", help="where our layer's time goes, instead of all this")
    parser.add_argument("--tiles", action="store_true", help="CUDA: also what other sizes of tiles would take")
    parser.add_argument("--compiled", action="store_true", help="CUDA: also what torch.compile makes of the layer")
    parser.add_argument("--anyway", action="store_true", help="CUDA: go on where a kernel's numbers are wrong")
    return parser.parse_args()


def measure_layer(case: Case, dtype: torch.dtype, device: str, seconds: float) -> dict[str, Any]:
    """Check and time every arm of a case."""
    weights = make_weights(case, device, dtype)
    peers = PEERS if device == "cpu" else PEERS | CUDA_PEERS
    builds = {"dense": dense, **OURS, **BASELINES, **peers}
    arms = {name: partial(build, case, weights) for name, build in builds.items()}
    found = compare(arms, module_loop(case, weights.double()), make_items(case, weights.gate), seconds)
    return {"case": str(case), "dtype": str(dtype).removeprefix("torch."), "arms": found}


def main() -> None:
    """Measure what was asked for, as long as there is time."""
    asked = options()
    say(machine(asked.device))
    if asked.device == "cuda":
        from benchmarks import cuda

        if not cuda.parity_holds() and not asked.anyway:
            say("Parity does not hold: no speed counts.")
            return
    cases = [QUICK] if asked.quick else CASES[asked.device]
    cases = cases if asked.case is None else [cases[number] for number in asked.case]
    names = asked.dtype or (["float32", "bfloat16"] if asked.device == "cpu" else ["bfloat16"])
    for case in cases:
        for name in names:
            if since_start() > asked.budget:
                say("Out of time before", case, name)
                return
            say(f"{case}, {name}")
            found = measure_layer(case, getattr(torch, name), asked.device, 0.1 if asked.quick else asked.seconds)
            record("layer", f"{case}, {name}", asked.device, found, asked.output)
    if asked.tiles:
        cuda.time_tiles(asked.budget)
    if asked.compiled:
        cuda.time_compiled(asked.budget)


if __name__ == "__main__":
    main()
