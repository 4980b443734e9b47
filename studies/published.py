"""Published figures beside what a plan predicts: pairs for docs/plan.md."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, get_args

from gatewright.planner import Device, Links, Part, Plan, Sizes, feed_forward_sizes, plan
from gatewright.planner.cost import all_to_all_seconds

Row = tuple[str, float, float | tuple[float, float], str]
"""What, predicted, published or measured (a range is its ends), unit."""
Exchange = Literal["flat", "per-node"]
H100 = Device(flops=989e12, efficiency=0.5)
A100 = Device(flops=312e12, efficiency=0.5)
GB200 = Device(flops=2500e12, efficiency=0.5)
K40 = {"flops": 4.29e12, "memory_bandwidth": 288e9}


def compute_over_communication(sizes: Sizes, device: Device, bandwidth: float) -> float:
    """Return forward arithmetic time over travel time: ``6 n / (b1 + b2) * B / (eta P)`` for SwiGLU experts.

    It depends on neither tokens, dim, top_k nor experts: https://arxiv.org/abs/1701.06538 section 3.2 puts it as "the
    ratio is the hidden size".
    """
    arithmetic = sizes.expert.flops / (device.efficiency * device.flops)
    return arithmetic / ((sizes.sent_bytes + sizes.returned_bytes) / bandwidth)


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


def tutel() -> Iterator[Row]:
    """Speed-ups over Fairseq of one layer (https://arxiv.org/abs/2206.03382 section 5.2).

    Each GPU has 16,384 tokens and 2 experts of 2,048 x 2,048; top-2, capacity factor 1, float16; A100s with 300 GB/s
    inside a node and 25 GB/s between (assumed). Fairseq's layer fills and empties slots by dense products of tokens x
    slots x dim, of which a step has five. The time of a message between nodes is fitted to what leaving those out
    brought at 2,048 GPUs. Sizes are quoted from a translation of the paper.
    """
    tokens, dim, top_k, kernels = 16384, 2048, 2, 1.04
    fairseq = Part(flops=5 / 3 * 2 * tokens * top_k * dim)  # A plan counts three times what forward takes.

    def step(gpus: int, latency: float, products: Part, exchange: Exchange = "flat", overlap: bool = False) -> float:
        sizes = feed_forward_sizes(
            tokens=tokens * gpus,
            dim=dim,
            ffn=dim,
            num_experts=2 * gpus,
            top_k=top_k,
            row_bytes=2,
            state_per_parameter=0,
        )
        links = Links(inside=300e9, between=25e9, between_latency=latency, exchange=exchange)
        sizes = replace(sizes, dense=products)
        found = plan(sizes, gpus, gpus, links=links, device=A100, imbalance=1.0, overlap=overlap)
        return found.seconds.step

    bare = step(2048, 0.0, Part())
    latency = ((step(2048, 0.0, fairseq) - bare) / (kernels - 1) - bare) / (4 * 2040)  # four trips to 2,040 GPUs
    for gpus, gain, unit in ((2048, kernels, "x, fitted"), (16, 3.52, "x")):
        yield (
            f"Tutel, {gpus:,} GPUs: its kernels",
            step(gpus, latency, fairseq) / step(gpus, latency, Part()),
            gain,
            unit,
        )
    hierarchical = step(2048, latency, Part()) / step(2048, latency, Part(), "per-node")
    yield "Tutel, 2,048 GPUs: its hierarchical exchange on top", hierarchical, 4.25, "x"
    for gpus, gain in ((16, 4.96), (128, 3.11), (2048, 5.75)):
        best = min(step(gpus, latency, Part(), exchange, overlap=True) for exchange in get_args(Exchange))
        yield f"Tutel, {gpus:,} GPUs: all of it", step(gpus, latency, fairseq) / best, gain, "x"


def megatron() -> Iterator[Row]:
    """DeepSeek-V3 by Megatron Core (https://arxiv.org/abs/2603.07685 section 4.2 and table 7), experts over 64 GPUs.

    4,096 tokens per GPU (assumed) of 7,168 to 8 of 256 experts of 2,048, 58 layers, 37 billion parameters active, rows
    in bfloat16, half of bfloat16's peak; all 64 GB200 share NVLink. Figures are quoted from summaries of the paper.
    """
    tokens, active = 4096, 37e9
    experts = feed_forward_sizes(
        tokens=64 * tokens, dim=7168, ffn=2048, num_experts=256, top_k=8, layers=58, matrices=3, row_bytes=2
    )
    rest = active - experts.layers * experts.top_k * experts.expert.parameters
    sizes = replace(experts, dense=Part(flops=2 * rest))
    machines = {
        "H100": (H100, Links(), (9164, 8727), (40, 60)),
        "GB200": (GB200, Links(ranks_per_node=64, inside=900e9), (930, 827), (20, 20)),
    }
    for name, (device, links, times, share) in machines.items():
        trip = all_to_all_seconds(tokens, 8, sizes.sent_bytes, 64, links) * 1e6
        for direction, time in zip(("there", "back"), times, strict=True):
            yield f"Megatron Core, {name}: all-to-all {direction}", trip, time, "us"
        seconds = plan(sizes, 64, 64, links=links, device=device, imbalance=1.0).seconds
        yield (
            f"Megatron Core, {name}: all-to-all's share of a step",
            100 * seconds.all_to_all / seconds.step,
            share,
            "%",
        )
    hybrid = all_to_all_seconds(tokens, 8, sizes.sent_bytes, 64, Links(exchange="per-node")) * 1e6
    yield "Megatron Core, H100: one copy per node there", hybrid, 4626, "us"


def published() -> list[Row]:
    """Everything that is compared with a published figure."""
    return [row for rows in (ratio_law, deepseek, deepep, shazeer, gshard, tutel, megatron) for row in rows()]
