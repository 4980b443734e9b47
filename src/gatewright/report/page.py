"""One page about a run that can be mailed: a single HTML file with everything inside, at home in light and dark."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gatewright.atomic import atomic_write
from gatewright.extras import require
from gatewright.report.curves import Curves, draw_load, draw_panel, load_curves, panels, read_metrics
from gatewright.report.facts import (
    LOAD,
    class_label,
    class_names_of,
    class_word,
    count,
    counts_by_class,
    experts_of,
    favourites_heading,
    health,
    item_of,
    layer_kind,
    layer_summary,
    result_facts,
    routing_summary,
    test_headline,
    warnings,
)
from gatewright.report.figure import label, legend_below, new_figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A chart is as wide as a phone, in inches, so that its letters are legible there.
CHART_WIDTH = 4.0
MAX_CONFUSION_CLASSES = 30
NUM_MISTAKES = 20


def write_report(output: Path) -> Path:
    """Write `report.html` into a run's folder, from its `result.json` and its `metrics.jsonl`."""
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    metrics = output / "metrics.jsonl"
    page = _render(result, read_metrics(metrics) if metrics.is_file() else {})
    path = output / "report.html"
    with atomic_write(path) as partial_page:
        partial_page.write_text(page, encoding="utf-8")
    return path


def _render(result: Mapping[str, Any], curves: Curves) -> str:
    """Fill in `templates/report.html`, which escapes everything but the drawings."""
    jinja2 = require("jinja2", "train")
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("gatewright.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    class_names, hardware, item = class_names_of(result), result["hardware"], item_of(result)
    page: str = environment.get_template("report.html").render(
        {"count": count, "LOAD": LOAD, "FAVOURITES": favourites_heading(item)},
        result=result,
        item=item,
        word=class_word(result),
        title=f"{result['recipe']}, seed {result['seed']}",
        headline=test_headline(result),
        health=health(list(result["layers"].values())) if result["layers"] else "",
        warnings=warnings(result),
        summary=_summary(result),
        num_items=_num_items(result),
        curves=[_chart(name, partial(draw_panel, quantity=name, curves=curves), 2.9) for name in panels(curves)],
        layers=[_layer(name, layer, result, curves) for name, layer in result["layers"].items()],
        class_names=class_names,
        labels=[class_label(name) for name in class_names],
        hardware=[("hardware", hardware)] if isinstance(hardware, str) else hardware.items(),
        **_confusion(result.get("confusion") or []),
    )
    return page


def _num_items(result: Mapping[str, Any]) -> int:
    number: int = result.get("num_test_items") or sum(map(sum, result.get("confusion") or []))
    return number


def _summary(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    facts = [(key, value) for key, value in result_facts(result) if key not in ("recipe", test_headline(result)[0])]
    if "command" in result:
        facts += [("command", result["command"]), ("finished", f"{result['finished'][:16].replace('T', ' ')} UTC")]
    return facts


def _layer(name: str, layer: Mapping[str, Any], result: Mapping[str, Any], curves: Curves) -> dict[str, Any]:
    tokens, by_class = counts_by_class(layer)
    shares = [] if by_class is None or tokens is None else (by_class / tokens[:, None]).tolist()
    return {
        "name": name,
        "kind": layer_kind(layer),
        "routing": routing_summary(layer, _num_items(result), item_of(result)),
        "summary": layer_summary(layer),
        "experts": experts_of(layer, class_names_of(result)),
        "spans": layer.get("spans"),
        "own": layer if "profiles" in layer else None,
        "numbers": [str(index) for index in range(len(layer["tokens_per_expert"]))],
        "alike_shares": [[max(cosine, 0.0) for cosine in row] for row in layer.get("alike") or []],
        "alike_texts": [[f"{100 * cosine:.0f}" for cosine in row] for row in layer.get("alike") or []],
        "shares": shares,
        "texts": [[f"{100 * share:.0f}" for share in row] for row in shares],
        **_load_in_training(name, curves),
    }


def _load_in_training(name: str, curves: Curves) -> dict[str, Any]:
    found = load_curves(curves, name)
    if found is None:
        return {"load": None}
    steps, loads = found
    dead = int(curves.get(f"train/layers/{name}/dead_experts", {}).get(steps[-1], 0))
    idle = f"{count(dead, 'expert')} of {loads.shape[1]} got nothing" if dead else "every expert got something"
    draw = partial(draw_load, steps=steps, loads=loads)
    return {"idle": idle, "load": _chart("share of the assignments (%)", draw, 3.5, columns=2)}


def _chart(title: str, draw: Callable[["Axes"], None], height: float, columns: int = 1) -> dict[str, Any]:
    figure = new_figure(CHART_WIDTH, height)
    axes = figure.add_subplot()
    draw(axes)
    label(axes, x="optimizer step")
    legend_below(axes, columns)
    drawing = svg(figure, f"{title} over the optimizer steps")
    return {"title": title, "drawing": require("markupsafe", "train").Markup(drawing)}


def _confusion(confusion: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Return all of a few classes, and of many classes what is mistaken most often."""
    if len(confusion) > MAX_CONFUSION_CLASSES:
        cells = ((n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if i != j and n)
        return {"mistakes": sorted(cells, reverse=True)[:NUM_MISTAKES], "confusion": None}
    shares = [[number / sum(row) if sum(row) else float("nan") for number in row] for row in confusion]
    texts = [[number or "" for number in row] for row in confusion]
    return {"mistakes": [], "confusion": {"shares": shares, "texts": texts} if confusion else None}
