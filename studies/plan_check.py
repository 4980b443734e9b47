"""Plans beside published figures, and beside this machine: ``python -m studies.plan_check [--measure]``.

It rewrites the tables in docs/plan.md, those of measurements only when told to. Run it in the repository's root.
"""

import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gatewright.cli.plan import recipe_sizes
from gatewright.planner import Device, Links, Sizes, feed_forward_sizes, plan, smallest
from gatewright.planner.measure import measure
from gatewright.recipes import RECIPES
from gatewright.tasks import task_named
from gatewright.train.device import autocast
from studies.published import H100, Row, published

PAGE = Path(__file__).parent.parent / "docs" / "plan.md"


def table(rows: list[Row], other: str) -> str:
    """Lay rows out as Markdown, the error as a share of what was found; of a range, of its nearer end."""
    lines = [f"| what | predicted | {other} | error |", "|---|---|---|---|"]
    for what, predicted, found, unit in rows:
        least, most = found if isinstance(found, tuple) else (found, found)
        nearest = min(max(predicted, least), most)
        error = f"{100 * (predicted / nearest - 1):+.1f} %" if nearest else ("0 %" if predicted == 0 else "")
        figure = _figure(least) if least == most else f"{_figure(least)} to {_figure(most)}"
        lines.append(f"| {what} | {_figure(predicted)} | {f'{figure} {unit}'.strip()} | {error} |")
    return "\n".join(lines)


def _figure(number: float) -> str:
    return f"{number:,.0f}" if number >= 1000 else f"{number:.5g}"


def answers() -> str:
    """Return a table of the fewest processes for 1,024 experts per layer, on nodes of 8, with rows in bfloat16."""
    lines = [
        "| experts | parameters | memory each | fewest processes | ep size | memory used | step | efficiency |",
        "|---|---|---|---|---|---|---|---|",
    ]
    small = {"dim": 1024, "ffn": 4096, "matrices": 2, "top_k": 2, "layers": 12, "tokens": 1_048_576}
    large = {"dim": 4096, "ffn": 2048, "matrices": 3, "top_k": 8, "layers": 24, "tokens": 4_194_304}
    for shape, memory in ((small, 24e9), (small, 80e9), (large, 80e9), (large, 141e9)):
        sizes = feed_forward_sizes(num_experts=1024, row_bytes=2, **shape)
        processes, ep_size = smallest(sizes, memory, ranks_per_node=8)
        found = plan(sizes, processes, ep_size, device=H100, links=Links())
        name = " x ".join(str(shape[size]) for size in ("dim", "ffn"))
        what = f"{shape['layers']} layers of 1,024, {name}, {shape['matrices']} matrices, top-{shape['top_k']}"
        parameters = sizes.dense.parameters + shape["layers"] * 1024 * sizes.expert.parameters
        cells = [f"{what}, {shape['tokens']:,} tokens", f"{parameters / 1e9:,.0f} billion", f"{memory / 1e9:.0f} GB"]
        cells += [str(processes), str(ep_size), f"{found.memory.total / 1e9:.1f} GB"]
        cells += [f"{found.seconds.step:.3f} s", f"{found.seconds.efficiency:.0%}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def between_markers(text: str, name: str, new: str) -> str:
    """Put a table where a page has its markers.

    Raises:
        ValueError: If the page has none.
    """
    start, end = f"<!-- {name} -->\n", f"\n<!-- /{name} -->"
    before, found, rest = text.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise ValueError(f"The page has markers {start.strip()} and {end.strip()} around its table; they are missing.")
    return before + start + new + end + after


def memory_and_bytes(ranks: Callable[..., list[Any]]) -> Iterator[Row]:
    """Real steps of a small mixture on gloo processes, the busiest process of each; routing is random."""
    from tests.parallel import plans

    for world, ep_size, optimizer in ((2, 1, "adamw"), (2, 2, "sgd"), (4, 2, "adamw"), (4, 4, "adamw")):
        sizes = plans.sizes_of(8, 512, optimizer=optimizer)
        found, expected = ranks(world, plans.step, ep_size, 8, 512, "gelu", optimizer), plan(sizes, world, ep_size)
        name = f"{world} processes, ep size {ep_size}, {optimizer}"
        kept = max(one["weights"] + one["gradients"] + one["optimizer"] + one["counters"] for one in found)
        planned = expected.memory.total - expected.memory.activations
        yield f"{name}: weights, gradients, state", planned, kept, "B"
        reduced = expected.traffic.dense_reduced + expected.traffic.expert_reduced
        yield f"{name}: gradients reduced", reduced, max(r["dense_reduced"] + r["expert_reduced"] for r in found), "B"
        sent = sum(one["sent"] for one in found) / world
        yield f"{name}: all-to-all, mean", expected.traffic.all_to_all, sent, "B"
        kept, rows = max(ranks(world, plans.kept, ep_size, 8, 512, "gelu"))
        skewed = plans.sizes_of(8, 512, router=plans.TopK)
        imbalance = max(1.0, rows / (512 * plans.TOP_K / world))
        yield f"{name}: activations", plan(skewed, world, ep_size).memory.activations, kept, "B"
        told = plan(skewed, world, ep_size, imbalance=imbalance).memory.activations
        yield f"{name}: activations, told the imbalance ({imbalance:.2f})", told, kept, "B"


def recipes() -> Iterator[Row]:
    """Activations of recipes' real networks, at 64 images on one process."""
    for name in ("digits", "cifar10-cnn", "cifar10-resnets", "cifar10-resnets-stem"):
        run = RECIPES[name]()
        run = replace(run, data=replace(run.data, batch_size=64), model=replace(run.model, upcycle_epoch=0))
        planned = plan(recipe_sizes(run), 1, 1).memory.activations
        task = task_named(run.task)
        fingerprint, inputs = task.sketch(run.data, run.model)
        torch.manual_seed(0)
        model = task.build(run.model, fingerprint)
        found = measure(model, inputs(64), context=partial(autocast, torch.device("cpu"), run.precision))
        yield f"{name}: activations of 64 images", planned, found.outside.saved, "B"


def times(ranks: Callable[..., list[Any]]) -> Iterator[Row]:
    """Real steps of a layer, with the machine's own rates measured beside them."""
    from studies import plan_workers as workers

    for world, ep_size in ((1, 1), (2, 2), (2, 1)):
        found = ranks(world, workers.measure, ep_size)
        machine = {name: statistics.median(one[name] for one in found) for name in found[0]}
        device = Device(flops=machine["flops"], efficiency=1.0, memory_bandwidth=machine["memory_bandwidth"])
        links = Links(
            inside=machine["bandwidth"],
            between=machine["bandwidth"],
            inside_latency=machine["latency"],
            between_latency=machine["latency"],
        )
        expected = plan(_sizes_of(workers), world, ep_size, links=links, device=device).seconds
        rates = f"{machine['flops'] / 1e9:.0f} GFLOP/s, update {machine['memory_bandwidth'] / 1e9:.1f} GB/s"
        if world > 1:
            rates += f", link {machine['bandwidth'] / 1e9:.2f} GB/s and {machine['latency'] * 1e6:.0f} us"
        name = f"{world} process{'es' if world > 1 else ''}, ep size {ep_size} ({rates})"
        yield f"{name}: step", expected.step * 1e3, machine["step"] * 1e3, "ms"


def _sizes_of(workers: Any) -> Sizes:
    return feed_forward_sizes(
        tokens=workers.TOKENS, dim=workers.DIM, ffn=workers.FFN, num_experts=workers.NUM_EXPERTS, top_k=workers.TOP_K
    )


def main() -> None:
    """Rewrite the page."""
    text = between_markers(PAGE.read_text(encoding="utf-8"), "published", table(published(), "published"))
    text = between_markers(text, "answer", answers())
    if "--measure" in sys.argv:
        from tests.ranks import Ranks

        with tempfile.TemporaryDirectory() as folder:
            ranks = Ranks(Path(folder))
            try:
                counted = [*memory_and_bytes(ranks.run), *recipes()]
                text = between_markers(text, "counted", table(counted, "measured"))
                text = between_markers(text, "timed", table(list(times(ranks.run)), "measured"))
            finally:
                ranks.close()
    PAGE.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
