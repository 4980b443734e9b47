"""Check parity, then time every case; print as it goes, and write ``$OUT/benchmarks.json`` and ``.md``."""

import gc
import json
import math
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks import parity
from benchmarks.arms import ARMS, gatewright
from benchmarks.cases import CASES, Case, make_weights
from benchmarks.tiles import timings
from benchmarks.timing import measure, profile

BUDGET = float(os.environ.get("BENCHMARK_SECONDS", "240"))
COMPILED = [CASES[1], CASES[7]]
PEERS = ("sort and product", "transformers")
START = time.monotonic()


def say(*parts: object) -> None:
    """Print at once, with the seconds since the start."""
    print(f"[{time.monotonic() - START:5.1f}s]", *parts, flush=True)


def parity_holds() -> bool:
    """Print what differs from the reference, and whether all of it may."""
    checked = list(parity.kernels())
    bad = [(name, difference) for name, difference, fine in checked if not fine]
    say(f"kernels: {len(checked)} checks, largest difference {max(each[1] for each in checked):.2e}, {len(bad)} wrong")
    for name, difference in bad:
        say("WRONG", name, f"{difference:.2e}")
    return all([not bad, *(holds(check) for check in parity.OF_A_LAYER)])


def holds(check: Callable[[], bool]) -> bool:
    """Print what a check of a layer says, or how it failed."""
    try:
        found = check()
    except Exception:
        traceback.print_exc()
        found = False
    say(check.__name__, found)
    return found


def run(case: Case) -> dict[str, Any]:
    """Build every arm of a case, compare outputs, and time them."""
    weights = make_weights(case)
    arms = {}
    for name, build in ARMS.items():
        try:
            arms[name] = build(case, weights).cuda()
        except ImportError as error:
            say(name, "is left out:", error)
    x = torch.randn(case.tokens, case.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    with torch.no_grad():
        exact = arms["gatewright rows"](x).float()
        differences = {name: float((arm(x).float() - exact).norm() / exact.norm()) for name, arm in arms.items()}
    found = measure(arms, x)
    kernels = profile(arms["gatewright triton"], x)
    return {
        "case": str(case),
        "kernels": kernels,
        "arms": {name: {**found[name], "difference": differences[name]} for name in arms},
    }


def table(results: list[dict[str, Any]]) -> str:
    """A row per case: forward and backward in ms, forward alone in brackets, ratios, and memory held."""
    names = list(results[0]["arms"])
    lines = [f"| case | {' | '.join(names)} | triton / best peer | held, triton / best peer |"]
    lines.append("| --- " * (len(names) + 3) + "|")
    for result in results:
        arms = result["arms"]
        cells = [f"{arms[name]['ms']:.2f} ({arms[name]['forward_ms']:.2f})" for name in names]
        lines.append(
            f"| {result['case']} | {' | '.join(cells)} | {ratio(arms, 'ms'):.2f} | {ratio(arms, 'held_mb'):.2f} |"
        )
    for key in ("ms", "forward_ms", "held_mb", "peak_mb"):
        ratios = [ratio(result["arms"], key) for result in results]
        mean = math.exp(sum(map(math.log, ratios)) / len(ratios))
        lines.append(f"\n{key}: triton over the best peer, geometric mean {mean:.2f}, worst {max(ratios):.2f}")
    return "\n".join(lines)


def ratio(arms: dict[str, Any], key: str) -> float:
    """Triton's figure over that of the best peer, of those that ran."""
    return float(arms["gatewright triton"][key] / min(arms[name][key] for name in PEERS if name in arms))


def in_time(what: object) -> bool:
    """Whether there is time for more, which is said where there is none."""
    late = time.monotonic() - START > BUDGET
    if late:
        say("out of time before", what)
    return not late


def time_tiles() -> None:
    """Print what other tile sizes would take, kernel by kernel."""
    for case in CASES:
        if not in_time(f"tiles of {case}"):
            return
        for name, found in timings(case):
            say("tiles", case, f"{name:<23}", "  ".join(found))
        gc.collect()
        torch.cuda.empty_cache()


def time_compiled() -> None:
    """Print what `torch.compile` makes of the layer, beside the layer itself."""
    for case in COMPILED:
        if not in_time(f"{case} compiled"):
            return
        try:
            layer = gatewright(case, make_weights(case), "triton")
            x = torch.randn(case.tokens, case.dim, device="cuda", dtype=torch.bfloat16, requires_grad=True)
            found = measure({"plain": layer, "compiled": torch.compile(layer, fullgraph=True)}, x)
        except Exception:
            traceback.print_exc()
            continue
        for name, figures in found.items():
            say(case, f"{name:<18}", " ".join(f"{key} {value:.3f}" for key, value in figures.items()))


def main() -> None:
    """Run everything that fits in the budget."""
    out = Path(os.environ.get("OUT", "."))
    say(torch.cuda.get_device_name(), "torch", torch.__version__, "python", platform.python_version())
    if not parity_holds():
        say("Parity does not hold: no speed counts.")
        if "--anyway" not in sys.argv:
            return
    results: list[dict[str, Any]] = []
    for case in CASES:
        if not in_time(case):
            break
        try:
            results.append(run(case))
        except Exception:
            traceback.print_exc()
            continue
        finally:
            gc.collect()
            torch.cuda.empty_cache()
        for name, arm in results[-1]["arms"].items():
            say(case, f"{name:<18}", " ".join(f"{key} {value:.3f}" for key, value in arm.items()))
        say("longest kernels of gatewright triton, ms:", results[-1]["kernels"])
        (out / "benchmarks.json").write_text(json.dumps(results, indent=1))
    (out / "benchmarks.md").write_text(table(results))
    print(table(results), flush=True)
    if "--tiles" in sys.argv:
        time_tiles()
    if "--compiled" in sys.argv:
        time_compiled()


main()
