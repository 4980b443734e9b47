"""One page about a run that can be mailed: a single HTML file with everything inside, at home in light and dark."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from gatewright.report.curves import PANELS, Curves, draw_load, draw_panel, load_curves, read_metrics
from gatewright.report.elements import bar, heat_table, pairs, table
from gatewright.report.facts import (
    FAVOURITES,
    LOAD,
    ExpertFacts,
    class_label,
    class_names_of,
    count,
    expert_facts,
    layer_kind,
    layer_summary,
    result_facts,
    routing_summary,
    test_headline,
)
from gatewright.report.figure import label, legend_below, new_figure, svg

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# A chart is as wide as a phone, in inches, so that its letters are legible there.
CHART_WIDTH = 4.0
MAX_CONFUSION_CLASSES = 30
NUM_MISTAKES = 20
LOSSES = (
    "The training loss is that of augmented images, with label smoothing if the run uses it, and is smoothed over its "
    "pale raw line. The other losses are those of unchanged images, without label smoothing."
)
ON_THE_TEST_SET = "On the test set, without augmentation or noise of the router"
IN_TRAINING = "In training, with augmentation and noise of the router"
TWO_LOADS = (
    "These are shares of the training batches and not those on the test set: an expert may be used in training and get "
    "no test image, or the other way round."
)


def write_report(output: Path) -> Path:
    """Write `report.html` into a run's folder, from its `result.json` and its `metrics.jsonl`.

    Args:
        output: The run's folder.
    """
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    metrics = output / "metrics.jsonl"
    curves = read_metrics(metrics) if metrics.is_file() else {}
    title = f"{result['recipe']}, seed {result['seed']}"
    parts = [
        *_heading(title, result),
        *_training(curves),
        *(part for name, layer in result["layers"].items() for part in _layer(name, layer, result, curves)),
        *_classes(result),
        *_origin(result),
    ]
    style = Path(__file__).with_name("style.css").read_text(encoding="utf-8")
    viewport = '<meta name="viewport" content="width=device-width, initial-scale=1">'
    head = f'<meta charset="utf-8">{viewport}<title>{escape(title)}</title><style>\n{style}</style>'
    page = f"<!DOCTYPE html>\n<html lang=en><head>{head}</head>\n<body>\n"
    path, partial_path = output / "report.html", output / ".report.html"
    partial_path.write_text(page + "\n".join(parts) + "\n</body></html>\n", encoding="utf-8")
    partial_path.replace(path)
    return path


def _heading(title: str, result: Mapping[str, Any]) -> Iterable[str]:
    yield f"<h1>{escape(title)}</h1>"
    name, value = test_headline(result)
    images = sum(map(sum, result.get("confusion") or []))
    of = f"of {count(images, 'test image')}" if images else "of the test images"
    said = f"{of} are classified right" if "test_accuracy" in result else name
    yield f'<div class="accuracy">{escape(value)}</div><p>{escape(said)}</p>'
    shown = [(key, value) for key, value in result_facts(result) if key not in ("recipe", name)]
    if "command" in result:
        shown += [("command", result["command"]), ("finished", f"{result['finished'][:16].replace('T', ' ')} UTC")]
    yield pairs(shown)


def _training(curves: Curves) -> Iterable[str]:
    if not curves:
        return
    drawn = {quantity: partial(draw_panel, quantity=quantity, curves=curves) for quantity in PANELS}
    charts = [_chart(quantity, draw, 2.9, columns=1) for quantity, draw in drawn.items()]
    yield f'<h2>Training</h2><p>{LOSSES}</p><div class="charts">{"".join(charts)}</div>'


def _layer(name: str, layer: Mapping[str, Any], result: Mapping[str, Any], curves: Curves) -> Iterable[str]:
    counts, class_names = layer["class_by_expert"], class_names_of(result)
    tokens = torch.tensor(layer["tokens_per_class"]) if counts else None
    by_class = torch.tensor(counts) if counts else None
    yield f"<h2>{escape(layer_kind(layer))} <code>{escape(name)}</code></h2>"
    yield f"<p>{escape(routing_summary(layer, sum(map(sum, result.get('confusion') or []))))}</p>"
    yield f"<h3>{ON_THE_TEST_SET}</h3><p>{escape(layer_summary(layer))}.</p>"
    facts = expert_facts(torch.tensor(layer["tokens_per_expert"]), by_class, tokens, class_names)
    highest = max(expert.share for expert in facts) or 1
    rows = ([str(expert.index), bar(expert.share_text, expert.share, highest), _favourites(expert)] for expert in facts)
    yield table(["expert", LOAD, FAVOURITES], rows)
    yield '<div class="side"><div>'
    if by_class is not None and tokens is not None:
        yield from _class_by_expert((by_class / tokens[:, None]).tolist(), class_names)
    yield "</div><div>"
    yield from _load_in_training(name, curves)
    yield "</div></div>"


def _class_by_expert(shares: Sequence[Sequence[float]], class_names: Sequence[str]) -> Iterable[str]:
    yield "<h3>Percent of each class's test images that reach an expert</h3>"
    words = [[f"{100 * share:.0f}" for share in row] for row in shares]
    experts = [str(index) for index in range(len(shares[0]))]
    yield heat_table("class \\ expert", [class_label(name) for name in class_names], experts, shares, words)


def _favourites(expert: ExpertFacts) -> str:
    if expert.dead:
        return '<span class="dead">dead: no test image</span>'
    return escape(expert.favourites_text) or ("hardly an image" if expert.share < 0.01 else "")


def _load_in_training(name: str, curves: Curves) -> Iterable[str]:
    found = load_curves(curves, name)
    if found is None:
        return
    steps, loads = found
    dead = int(curves.get(f"train/layers/{name}/dead_experts", {}).get(steps[-1], 0))
    yield f"<h3>{IN_TRAINING}</h3>"
    idle = f"{count(dead, 'expert')} of {loads.shape[1]} got nothing" if dead else "every expert got something"
    yield f"<p>At the last logged step {idle}. {TWO_LOADS}</p>"
    draw = partial(draw_load, steps=steps, loads=loads)
    yield _chart("share of the assignments (%)", draw, 3.5, columns=2)


def _chart(title: str, draw: Callable[["Axes"], None], height: float, columns: int) -> str:
    figure = new_figure(CHART_WIDTH, height)
    axes = figure.add_subplot()
    draw(axes)
    label(axes, x="optimizer step")
    legend_below(axes, columns)
    drawing = svg(figure, f"{title} over the optimizer steps")
    return f"<figure><figcaption>{escape(title[0].upper() + title[1:])}</figcaption>{drawing}</figure>"


def _classes(result: Mapping[str, Any]) -> Iterable[str]:
    accuracies = result.get("test_accuracy_per_class")
    if not accuracies:
        return
    yield '<h2>Classes of the test set</h2><div class="side"><div><h3>Accuracy of each class</h3>'
    yield table(["class", "accuracy"], ([escape(class_label(n)), bar(f"{a:.1%}", a, 1)] for n, a in accuracies.items()))
    yield "</div><div>"
    if result.get("confusion"):
        yield from _confusion(result["confusion"], list(accuracies))
    yield "</div></div>"


def _confusion(confusion: Sequence[Sequence[int]], class_names: Sequence[str]) -> Iterable[str]:
    """Show all of a few classes, and of many classes what is mistaken most often."""
    names = [class_label(name) for name in class_names]
    if len(names) > MAX_CONFUSION_CLASSES:
        cells = ((n, i, j) for i, row in enumerate(confusion) for j, n in enumerate(row) if i != j and n)
        rows = ([str(n), escape(names[i]), escape(names[j])] for n, i, j in sorted(cells, reverse=True)[:NUM_MISTAKES])
        yield "<h3>The most frequent mistakes</h3>"
        yield table(["images", "of", "taken for"], rows)
        return
    yield "<h3>Images by true class (rows) and predicted class (columns)</h3>"
    shares = [[number / sum(row) if sum(row) else float("nan") for number in row] for row in confusion]
    words = [[str(number) if number else "" for number in row] for row in confusion]
    yield heat_table("true \\ predicted", names, class_names, shares, words)


def _origin(result: Mapping[str, Any]) -> Iterable[str]:
    hardware = result["hardware"]
    yield '<h2>Made with</h2><div class="side">'
    yield pairs({"hardware": hardware}.items() if isinstance(hardware, str) else hardware.items())
    yield pairs(result["versions"].items())
    yield "</div>"
