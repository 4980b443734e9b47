"""Write docs/benchmarks.md from what was measured: ``python -m benchmarks.page``."""

import argparse
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.arms import BASELINES, OURS
from benchmarks.results import FOLDER, load

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
Record = Mapping[str, Any]
INTRODUCTION = """# Benchmarks

This page is generated from the JSON files of `benchmarks/results` by `python -m benchmarks.page`. `make bench`
measures everything anew, and each section names its own command, in which `--case N` chooses one case.

- All arms have the same weights and the same tokens, and are timed in turn in one process. A figure is the median of
  the rounds.
- An arm gets a figure only where its output, the gradient of its tokens, and the norm of the gradient of its weights
  (and its product with the weights) are those of a loop over experts in float64, within 1e-4 in float32 and 3e-2 in
  bfloat16. Tokens that rounding may send to another expert are left out of the comparison.
- Weights of k experts sum to 1, since most peers compute nothing else. Peers with a capacity get the least one that
  drops no token. st-moe-pytorch has thresholds of 0, mixture-of-experts its policy "all", and DeepSpeed neither
  random token selection nor sampling of the second expert, so that nothing is random. In bfloat16 st-moe-pytorch and
  mixture-of-experts run under autocast, because they mix dtypes without it. The losses that peers compute beside the
  output stay on.
- "gatewright" is the layer as it is, "torch" its fused way, and "rows" its way by rows. "dense" is a feed-forward of
  as many active operations. "Held" is what autograd saves for the backward pass, counted by its hooks, without
  parameters, tokens and output. "Peak" is the most that a step allocates, its gradients included, by torch's profiler
  on a CPU and by the allocator on a GPU.
"""


def page(devices: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the whole page from the records of every device."""
    parts = [INTRODUCTION]
    for device, records in devices.items():
        parts += [f"## On a {'GPU' if device == 'cuda' else 'CPU'}", *machines(records)]
        for name, section in SECTIONS.items():
            if name in records:
                parts += [*section(list(records[name].values()))]
    return "\n\n".join(part.strip("\n") for part in parts if part) + "\n"


def machines(records: Mapping[str, Mapping[str, Record]]) -> Iterator[str]:
    """Say what measured which records; of a section that was measured in several turns, by name."""
    found: dict[str, dict[str, list[str]]] = {}
    for section, entries in records.items():
        for key, entry in entries.items():
            about = dict(entry["machine"])
            hardware = f"{about.pop('hardware')}, {about.pop('threads')} threads"
            where = found.setdefault(f"{hardware}, " + ", ".join(f"{key} {value}" for key, value in about.items()), {})
            where.setdefault(section, []).append(key)
    for about, sections in found.items():
        names = (
            name if len(keys) == len(records[name]) else f"{name} of {'; '.join(f'({key})' for key in keys)}"
            for name, keys in sections.items()
        )
        yield f"- {', '.join(names)}: {about}."


def grid(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table."""
    head = list(head)
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def arms_table(
    records: list[Record], cell: Callable[[Record], str], last: Mapping[str, Callable[[Record], str]]
) -> str:
    """Return a row per case and a column per arm, and some more; an arm without a figure says so."""
    names = list(records[0]["arms"])
    rows = []
    for record in records:
        cells = [cell(arm) if "ms" in arm else missing(arm) for arm in (record["arms"].get(name, {}) for name in names)]
        rows.append([record["case"], *cells, *(column(record) for column in last.values())])
    return grid(["case", *names, *last], rows)


def missing(arm: Record) -> str:
    """Say in a cell why there is no figure; the sentences below the table have the reasons."""
    return "parity fails" if "difference" in arm else "left out"


def reasons(records: list[Record]) -> str:
    """Say for every arm without a figure why it has none."""
    found: dict[str, list[str]] = {}
    for record in records:
        for name, arm in record["arms"].items():
            if "ms" not in arm:
                why = arm.get("left_out") or f"its numbers differ by {arm['difference']:.0e}"
                found.setdefault(f"{name}: {why}", []).append(f"({record['case']})")
    return "\n".join(f"- {why}, at {', '.join(cases)}." for why, cases in found.items())


def ratio(record: Record, key: str, among: Iterable[str]) -> float | None:
    """Return our figure over the least of the others that have one."""
    others = [middle(record["arms"][name][key]) for name in among if "ms" in record["arms"].get(name, {})]
    ours = record["arms"]["gatewright"]
    return middle(ours[key]) / min(others) if others and "ms" in ours and min(others) else None


def middle(value: Any) -> float:
    """Return the median of quartiles, or the number."""
    return float(value[1] if isinstance(value, list) else value)


def summary(records: list[Record], against: Mapping[str, Iterable[str]]) -> str:
    """Return, against the fastest of several arms or one, geometric means of ours over it, and the worst case."""
    columns = {"ms": "time", "forward_ms": "forward", "held_mb": "held", "peak_mb": "peak"}
    rows = []
    for what, names in against.items():
        ratios = {key: [r for record in records if (r := ratio(record, key, names)) is not None] for key in columns}
        if ratios["ms"]:
            rows.append([what, str(len(ratios["ms"])), *map(mean_and_worst, ratios.values())])
    return grid(["ours over", "cases", *columns.values()], rows)


def mean_and_worst(ratios: list[float]) -> str:
    """Show the geometric mean, and the worst in brackets."""
    return f"{math.exp(sum(map(math.log, ratios)) / len(ratios)):.2f} ({max(ratios):.2f})" if ratios else ""


def compared(records: list[Record], peers: list[str]) -> Iterator[str]:
    """Yield the tables of one dtype: times, spread, memory, reasons and summaries."""
    best = {
        "ours / best peer": lambda record: shown(ratio(record, "ms", peers)),
        "ours / best other": lambda record: shown(ratio(record, "ms", [*peers, *BASELINES])),
    }
    yield "Milliseconds of forward and backward, forward alone in brackets:"
    yield arms_table(records, lambda arm: f"{arm['ms'][1]:.2f} ({arm['forward_ms'][1]:.2f})", best)
    yield "Ours over the others, geometric mean over the cases that they have a figure for, and the worst in brackets:"
    groups = {"the best peer": peers, "the best of all others": [*peers, *BASELINES]}
    yield summary(records, groups | {name: [name] for name in (*peers, *BASELINES)})
    yield "First and third quartile of forward and backward:"
    yield arms_table(records, lambda arm: f"{arm['ms'][0]:.2f}, {arm['ms'][2]:.2f}", {})
    yield "Megabytes held for backward, and at the peak in brackets:"
    yield arms_table(records, lambda arm: f"{arm['held_mb']:.1f} ({arm['peak_mb']:.1f})", {})
    yield reasons(records)


def shown(value: float | None) -> str:
    """Show a ratio, where there is one."""
    return "" if value is None else f"{value:.2f}"


def layer(records: list[Record]) -> Iterator[str]:
    """Yield the comparison of one layer."""
    peers = [name for record in records for name in record["arms"] if name not in {"dense", *OURS, *BASELINES}]
    for dtype in dict.fromkeys(record["dtype"] for record in records):
        yield f"### One layer, {dtype}"
        yield "A case is tokens, dim, ffn, experts, top-k. Its experts are SwiGLU if not gelu (`python -m benchmarks`)."
        yield from compared([record for record in records if record["dtype"] == dtype], list(dict.fromkeys(peers)))


def images(records: list[Record]) -> Iterator[str]:
    """Yield the comparison of mixtures of residual networks."""
    yield "### Residual networks as experts, float32"
    yield (
        "Whole images of CIFAR-10's size go to 2 of the networks of `cifar10-resnets`, which return as many numbers as "
        "an image has. In DeepSpeed's layer BatchNorm sees the zeros that groups are padded with; with GroupNorm its "
        "numbers agree. The right numbers are those of the module loop in float32. Dense is two of the networks on "
        "every image (`python -m benchmarks.images`)."
    )
    yield from compared(records, ["deepspeed"])


def scaling(records: list[Record]) -> Iterator[str]:
    """Yield what a token costs with more and more experts."""
    records = sorted(records, key=lambda record: record["experts"])
    names = list(dict.fromkeys(name for record in records for name in record["ms"]))
    routers = [name.removeprefix("layer, ") for name in names if name.startswith("layer, ")]
    optimizers = [name for name in names if name.partition(",")[0] not in ("layer", "router")]
    yield "### Many experts, float32"
    yield (
        "One layer (dim 256, ffn 512, gelu, 2 experts per token) with 64 assignments per expert on average, and either "
        "of two routers. Microseconds per token of forward and backward, of which the router alone takes a share, and "
        "of the experts' part of an optimizer's step (`python -m benchmarks.scaling`)."
    )
    rows = []
    for record in records:
        each = {name: 1e3 * values[1] / record["tokens"] for name, values in record["ms"].items()}
        cells = [
            f"{each[name]:.2f}" if name in each else "none" for name in (*map("layer, {}".format, routers), *optimizers)
        ]
        shares = [_share(each.get(f"router, {name}"), each.get(f"layer, {name}")) for name in routers]
        rows.append([str(record["experts"]), str(record["tokens"]), *cells, *shares])
    heads = [
        *(f"layer, {name}" for name in routers),
        *optimizers,
        *(f"share of the router, {name}" for name in routers),
    ]
    yield grid(["experts", "tokens", *heads], rows)
    left_out = [f"- {r['experts']} experts, {name}: {why}." for r in records for name, why in r["left_out"].items()]
    yield "\n".join(left_out)


def _share(part: float | None, whole: float | None) -> str:
    return f"{part / whole:.1%}" if part and whole else "none"


def steps(records: list[Record]) -> Iterator[str]:
    """Yield whole training steps beside dense twins'."""
    yield "### Whole training steps"
    yield "Milliseconds per step, the optimizer's included, and over the dense twin's (`python -m benchmarks.steps`)."
    rows = []
    for record in records:
        for name, (low, median, high) in record["ms"].items():
            twin = record["ms"].get(", ".join(["dense", *name.split(", ")[-1:]]), record["ms"].get("dense"))
            share = f"{median / twin[1]:.2f}" if twin else ""
            rows.append([record["model"], name, f"{median:.1f}", f"{low:.1f}, {high:.1f}", share])
    yield grid(["recipe", "model, precision", "ms", "quartiles", "of dense"], rows)


def where_time_goes(records: list[Record], most: int = 8) -> Iterator[str]:
    """Yield the operations that take longest, beside what they must take."""
    yield "### Where the time of our layer goes"
    yield (
        "Every operation of a step is timed alone. What it must take is the greater of its arithmetic at the rate of a "
        "large matrix product and its bytes at the rate of a copy, both measured then "
        "(`python -m benchmarks --profile`)."
    )
    for record in records:
        whole, least = (sum(row[key] for row in record["operations"]) for key in ("ms", "least_ms"))
        yield (
            f"({record['case']}), {record['dtype']}: a step takes {record['step_ms']:.2f} ms, its operations "
            f"{whole:.2f} ms, and they must take {least:.2f} ms at {record['gflops']:.0f} GFLOP/s and "
            f"{record['gbps']:.1f} GB/s."
        )
        shown_rows = record["operations"][:most]
        columns = ("calls", "ms", "least_ms", "gflop", "mb")
        rows = [[f"`{row['op']}`", *(f"{row[key]:.2f}" for key in columns)] for row in shown_rows]
        yield grid(["operation", "calls", "ms", "must take, ms", "GFLOP", "MB"], rows)


SECTIONS: dict[str, Callable[[list[Record]], Iterator[str]]] = {
    "layer": layer,
    "images": images,
    "scaling": scaling,
    "steps": steps,
    "profile": where_time_goes,
}


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.page", description=__doc__)
    parser.add_argument("--results", type=Path, default=FOLDER, help="folder of the JSON files")
    parser.add_argument("--output", type=Path, default=PAGE, help="the page")
    asked = parser.parse_args()
    devices = {device: found for device in ("cpu", "cuda") if (found := load(device, asked.results))}
    asked.output.write_text(page(devices))


if __name__ == "__main__":
    main()
