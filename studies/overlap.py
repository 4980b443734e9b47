"""A trace of one layer on two processes: what runs while tokens travel, with a shared expert and without.

    python -m studies.overlap            # prints the spans, and draws docs/overlap.png

Spans are of one forward in steady state on each process: the layer, the trip of its tokens to their experts from the
moment it starts until gloo says that all have arrived, the shared expert, the experts and the trip back.
"""

import os
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import matplotlib.pyplot as plt
import torch
import torch.distributed as dist
from torch import nn
from torch.multiprocessing.spawn import spawn

from gatewright import GroupedFeedForward, MoE, TopK
from gatewright.parallel import expert_mesh, parallelize
from gatewright.parallel.collectives import start_all_to_all

TOKENS, DIM, FFN, EXPERTS, FORWARDS = 4096, 1024, 2048, 4, 9
PICTURE = "docs/overlap.png"
Spans = list[tuple[str, float, float]]


def layer(shared: bool) -> MoE:
    """A mixture of four feed-forward networks, two per process."""
    torch.manual_seed(0)
    beside = nn.Sequential(nn.Linear(DIM, FFN), nn.GELU(), nn.Linear(FFN, DIM)) if shared else None
    return MoE(TopK(DIM, EXPERTS, 2, score_after_top_k=True), GroupedFeedForward(EXPERTS, DIM, FFN), shared=beside)


def trace(rank: int, shared: bool, results: Any) -> None:
    """Run forwards on one process, and hand over the spans of each."""
    torch.set_num_threads(1)
    os.environ.update({"MASTER_ADDR": "localhost", "MASTER_PORT": "29552", "RANK": str(rank), "WORLD_SIZE": "2"})
    dist.init_process_group("gloo")
    moe = layer(shared).eval()
    parallelize(moe, expert_mesh(2))
    x = torch.randn(TOKENS, DIM, generator=torch.Generator().manual_seed(rank))
    spans: Spans = []
    watch(moe.experts, "experts", spans)
    if moe.shared is not None:
        watch(moe.shared, "shared expert", spans)
    found = []
    for _ in range(FORWARDS):
        spans.clear()
        dist.barrier()
        began = time.perf_counter()
        with torch.no_grad(), patch("gatewright.parallel.dispatcher.start_all_to_all", travelling(spans)):
            moe(x)
        spans.append(("layer", began, time.perf_counter()))
        found.append([(name, start - began, end - began) for name, start, end in spans])
    results[rank] = sorted(found, key=lambda each: each[-1][2])[FORWARDS // 2]
    dist.destroy_process_group()


def watch(module: nn.Module, name: str, spans: Spans) -> None:
    """Note when a module runs."""
    starts: list[float] = []
    module.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    module.register_forward_hook(lambda *_: spans.append((name, starts.pop(), time.perf_counter())))


def travelling(spans: Spans) -> Callable[..., Any]:
    """Start an exchange as the dispatcher does, and have a thread note when it is done."""

    def start(*args: Any) -> Any:
        began = time.perf_counter()
        arrived, travel = start_all_to_all(*args)
        work = travel.work
        assert work is not None

        def note() -> None:
            while not work.is_completed():
                time.sleep(1e-4)
            spans.append(("tokens travel", began, time.perf_counter()))

        thread = threading.Thread(target=note)
        thread.start()
        wait = travel.wait

        def wait_and_join() -> None:
            wait()
            thread.join()

        travel.wait = wait_and_join  # type: ignore[method-assign]
        return arrived, travel

    return start


def main() -> None:
    """Trace both layers, print what was found and draw it."""
    figure, axes = plt.subplots(2, 1, figsize=(9, 4.6), sharex=True, layout="constrained")
    for axis, shared in zip(axes, (False, True), strict=True):
        with torch.multiprocessing.Manager() as manager:
            results = manager.dict()
            spawn(trace, (shared, results), 2)
            spans = dict(results)
        draw(axis, spans, "with a shared expert" if shared else "without")
        for rank, found in sorted(spans.items()):
            said = ", ".join(f"{name} {start * 1e3:.1f} to {end * 1e3:.1f}" for name, start, end in found)
            print(f"{'shared' if shared else 'plain'}, process {rank}, ms: {said}")
    axes[1].set_xlabel("milliseconds since the layer began")
    figure.savefig(PICTURE, dpi=120)


def draw(axis: Any, spans: dict[int, Spans], title: str) -> None:
    """Draw both processes' spans, one below the other."""
    kinds = {"layer": "0.85", "tokens travel": "tab:orange", "shared expert": "tab:green", "experts": "tab:blue"}
    for rank, found in spans.items():
        for name, start, end in found:
            lane = 4 * rank + list(kinds).index(name)
            axis.barh(lane, (end - start) * 1e3, left=start * 1e3, color=kinds[name])
            axis.text(start * 1e3, lane, f" {name}", va="center", fontsize=8)
    axis.set_yticks([1.5, 5.5], ["process 0", "process 1"])
    axis.invert_yaxis()
    axis.set_title(title, fontsize=10)


if __name__ == "__main__":
    main()
