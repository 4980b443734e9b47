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

from gatewright.cli.plan import SHAPES, RecipeArguments, recipe_sizes
from gatewright.models import ImageClassifier
from gatewright.parallel import Device, Links, Part, Plan, Sizes, feed_forward_sizes, plan, smallest
from gatewright.parallel.cost import all_to_all_seconds
from gatewright.parallel.measure import saved_bytes
from gatewright.parallel.plan import compute_over_communication
from gatewright.recipes import RECIPES
from gatewright.train.device import autocast

PAGE = Path(__file__).parent.parent / "docs" / "plan.md"
Row = tuple[str, float, float, str]  # what, predicted, published or measured, unit
H100 = Device(flops=989e12, efficiency=0.5)
K40 = {"flops": 4.29e12, "memory_bandwidth": 288e9}


def even(bandwidth: float) -> Links:
    """Links that are the same inside and between nodes."""
    return Links(inside=bandwidth, between=bandwidth)


def ratio_law() -> Iterator[Row]:
    """Section 6's own numbers: this checks the code and not the law."""
    for ffn, bandwidth, expected in ((2048, 50e9, 0.31), (2048, 450e9, 2.8), (8192, 50e9, 1.24), (8192, 450e9, 11.2)):
        sizes = feed_forward_sizes(tokens=1, dim=1, ffn=ffn, num_experts=1, top_k=1, matrices=3, row_bytes=2)
        what = f"Ratio law, n = {ffn}, {bandwidth / 1e9:.0f} GB/s: arithmetic over travel"
        yield what, compute_over_communication(sizes, H100, bandwidth), expected, ""


def deepseek() -> Iterator[Row]:
    """32 tokens to 9 experts, one expert on each of 256 devices; in the formula there no token stays at home."""
    for bandwidth, per_layer in ((50e9, 120.96), (900e9, 6.72)):
        there_and_back = sum(all_to_all_seconds(32, 9, 7000 * number, 256, even(bandwidth)) for number in (1, 2))
        yield (
            f"DeepSeek (ISCA 2025), {bandwidth / 1e9:.0f} GB/s: per layer and micro-batch",
            there_and_back * 1e6,
            per_layer,
            "us",
        )
        if bandwidth == 50e9:
            yield "DeepSeek (ISCA 2025): time per token, 61 layers twice", there_and_back * 2 * 61 * 1e3, 14.76, "ms"


def deepep() -> Iterator[Row]:
    """128 tokens of 7,168 to 8 experts, float8 there and bfloat16 back; 8 GPUs per node, no latency known."""
    links = Links(ranks_per_node=8, inside=160e9, between=50e9)
    published = {8: (77, 114), 16: (118, 195), 32: (155, 273), 64: (173, 314), 128: (192, 369), 256: (194, 360)}
    for ranks, times in published.items():
        for name, size, microseconds in zip(("dispatch", "combine"), (1, 2), times, strict=True):
            found = all_to_all_seconds(128, 8, 7168 * size, ranks, links) * 1e6
            yield f"DeepEP, low latency, {ranks} ranks: {name}", found, microseconds, "us"
    for ranks, rates in {8: (153, 158), 16: (43, 43), 32: (58, 57), 64: (51, 50)}.items():
        for name, rate in zip(("dispatch", "combine"), rates, strict=True):
            yield f"DeepEP, normal, {ranks} ranks: rate of {name}", 160 if ranks == 8 else 50, rate, "GB/s"


def shazeer() -> Iterator[Row]:
    """TFLOPS per GPU as experts grow; efficiency is fitted to the first row of each table, and the network left out.

    300,000 words per batch (assumed for the second table too), k = 4, experts 512 x 1024 x 512, as much arithmetic
    again beside them; 16 GPUs, then 32, 64 and 128. No optimizer state, as there.
    """
    small = {32: (16, 0.87), 256: (16, 0.81), 1024: (16, 0.90), 4096: (16, 0.74)}
    large = {32: (32, 0.83), 256: (32, 1.11), 1024: (32, 1.14), 4096: (32, 1.07), 16384: (32, 0.96)}
    large |= {65536: (64, 0.72), 131072: (128, 0.30)}
    for table, published in (("7", small), ("8", large)):
        first = published[32][1]
        for experts, (gpus, teraflops) in published.items():
            found = first * _k40_share(experts, gpus, first) / _k40_share(32, published[32][0], first)
            what = f"Shazeer et al. 2017, table {table}, {experts} experts on {gpus} GPUs"
            yield what, found, teraflops, "TFLOPS" + (", fitted" if experts == 32 else "")


def _k40_share(experts: int, gpus: int, teraflops: float) -> float:
    sizes = feed_forward_sizes(
        tokens=300_000, dim=512, ffn=1024, num_experts=experts, top_k=4, state_per_parameter=0, dense=Part(flops=8.4e6)
    )
    sizes = replace(sizes, dense=replace(sizes.dense, flops=8.4e6))  # not the router's, which they did in two levels
    device = Device(efficiency=teraflops * 1e12 / K40["flops"], **K40)
    return plan(sizes, gpus, min(gpus, experts), links=even(1e30), device=device).seconds.efficiency


def gshard() -> Iterator[Row]:
    """Share of the roofline, one expert per core; the bandwidth is fitted to 70 % at 128 cores, and latency left out.

    The last row is not the plan's: on a two-dimensional torus a core's share of the cut falls with the square root of
    their number.
    """
    core = Device(flops=61.5e12, efficiency=1.0)

    def at(cores: int, bandwidth: float) -> Plan:
        sizes = feed_forward_sizes(
            tokens=4_194_304, dim=1024, ffn=8192, num_experts=cores, top_k=2, row_bytes=2, state_per_parameter=0
        )
        return plan(replace(sizes, dense=Part()), cores, cores, links=even(bandwidth), device=core, imbalance=1.0)

    slow = at(128, 1.0).seconds
    fitted = slow.all_to_all / slow.compute / (1 / 0.70 - 1)
    yield "GShard, 128 cores: share of the roofline", 100 * at(128, fitted).seconds.efficiency, 70, "%, fitted"
    yield "GShard, 2,048 cores", 100 * at(2048, fitted).seconds.efficiency, 48, "%"
    torus = at(2048, fitted / (2048 / 128) ** 0.5).seconds.efficiency
    yield "GShard, 2,048 cores, if a torus is put in by hand", 100 * torus, 48, "%"


def published() -> list[Row]:
    """Everything that is compared with a published figure."""
    return [row for rows in (ratio_law, deepseek, deepep, shazeer, gshard) for row in rows()]


def table(rows: list[Row], other: str) -> str:
    """Lay rows out as Markdown, the error as a share of what was found."""
    lines = [f"| what | predicted | {other} | error |", "|---|---|---|---|"]
    for what, predicted, found, unit in rows:
        error = f"{100 * (predicted / found - 1):+.1f} %" if found else ("0 %" if predicted == 0 else "")
        lines.append(f"| {what} | {_figure(predicted)} | {f'{_figure(found)} {unit}'.strip()} | {error} |")
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
        run = replace(run, data=replace(run.data, batch_size=64), model=replace(run.model, split_epoch=0))
        planned = plan(recipe_sizes(RecipeArguments(run=run)), 1, 1).memory.activations
        shape, classes = SHAPES[run.data.name]
        torch.manual_seed(0)
        model = ImageClassifier(run.model.build(shape, classes), [0.0] * shape[0], [1.0] * shape[0])
        items, precision = torch.rand(64, *shape), run.precision
        found = saved_bytes(model, items, context=partial(autocast, torch.device("cpu"), precision))
        yield f"{name}: activations of 64 images", planned, found.outside, "B"


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
