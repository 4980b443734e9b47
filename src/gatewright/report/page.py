"""One page about a run that can be mailed: a single HTML file with the pictures inside."""

import base64
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch

from gatewright.report.facts import FAVOURITES, LOAD, expert_facts, layer_summary, result_facts
from gatewright.report.figure import DOTS_PER_INCH
from gatewright.report.pictures import picture_path

STYLE = """
:root { --ink: #1c2733; --soft: #5b6875; --line: #dde3e9; --blue: #0072b2; --red: #d55e00 }
body { margin: 0 auto; max-width: 62rem; padding: 2rem 1.2rem 4rem; color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
h1 { font-size: 1.7rem; margin: 0 } h2 { font-size: 1.2rem; margin: 2.6rem 0 .6rem }
p { margin: .3rem 0; color: var(--soft) }
.accuracy { font-size: 3rem; font-weight: 650; color: var(--blue); line-height: 1.2; margin-top: .6rem }
.scroll { overflow-x: auto } table { border-collapse: collapse; font-size: .92rem; margin: .6rem 0 }
th, td { text-align: left; padding: .28rem 1.1rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top }
th { color: var(--soft); font-weight: 550 } td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.bar { display: inline-block; height: .65rem; background: var(--blue); margin-left: .7rem; border-radius: 2px }
.dead { color: var(--red); font-weight: 650 } img { max-width: 100%; height: auto; margin: .8rem 0; display: block }
"""
BAR_REM = 9
CSS_DOTS_PER_INCH = 96


def write_report(output: Path) -> Path:
    """Write `report.html` into a run's folder, from its `result.json` and the pictures beside it.

    Args:
        output: The run's folder.
    """
    result = json.loads((output / "result.json").read_text(encoding="utf-8"))
    title = f"{result['recipe']}, seed {result['seed']}"
    parts = [
        *_heading(title, result),
        *_section("Training", _picture(output / "curves.png", "Loss, accuracy and learning rate over the steps")),
        *_section("Classes", *_classes(output, result["test_accuracy_per_class"])),
        *(part for name, layer in result["layers"].items() for part in _layer(output, name, layer, result)),
        *_section("Made with", _pairs(_as_mapping(result["hardware"]).items()), _pairs(result["versions"].items())),
    ]
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    page = f"<!DOCTYPE html>\n<html lang=en><head>{head}<style>{STYLE}</style></head>\n<body>\n"
    path = output / "report.html"
    partial = output / ".report.html"
    partial.write_text(page + "\n".join(parts) + "\n</body></html>\n", encoding="utf-8")
    partial.replace(path)
    return path


def _heading(title: str, result: Mapping[str, Any]) -> Iterable[str]:
    yield f"<h1>{escape(title)}</h1>"
    yield f'<div class="accuracy">{result["test_accuracy"]:.2%}</div><p>of the test images are classified right</p>'
    yield _pairs((key, value) for key, value in result_facts(result) if key not in ("recipe", "test accuracy"))


def _section(title: str, *parts: str) -> Iterable[str]:
    yield f"<h2>{escape(title)}</h2>"
    yield from parts


def _classes(output: Path, accuracies: Mapping[str, float]) -> Iterable[str]:
    rows = [[escape(name), _bar(accuracy, 1)] for name, accuracy in accuracies.items()]
    yield _table(["class", "test accuracy"], rows)
    yield _picture(output / "confusion.png", "Images by true and predicted class")


def _layer(output: Path, name: str, layer: Mapping[str, Any], result: Mapping[str, Any]) -> Iterable[str]:
    counts = layer["class_by_expert"]
    facts = expert_facts(
        torch.tensor(layer["tokens_per_expert"]),
        torch.tensor(counts) if counts else None,
        torch.tensor(layer["tokens_per_class"]) if counts else None,
        list(result["test_accuracy_per_class"]),
    )
    highest = max(expert.share for expert in facts) or 1
    rows = [
        [
            str(expert.index),
            _bar(expert.share, highest),
            '<span class="dead">dead</span>' if expert.dead else escape(expert.favourites_text),
        ]
        for expert in facts
    ]
    yield from _section(f"Layer {name}", f"<p>{escape(layer_summary(layer))}</p>")
    yield _table(["expert", LOAD, FAVOURITES], rows)
    yield _picture(picture_path(output, "load", name), f"Load of the experts of {name} over the steps")
    yield _picture(
        picture_path(output, "classes", name), f"Share of each class's images that reaches each expert of {name}"
    )


def _bar(share: float, highest: float) -> str:
    bar = f'<span class="bar" style="width: {BAR_REM * share / highest:.2f}rem"></span>'
    return f"{share:.1%}{bar if share else ''}"


def _table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table; the headings and rows are HTML already."""
    head = "".join(f"<th>{heading}</th>" for heading in headings)
    body = "".join("<tr>" + "".join(f'<td class="number">{cell}</td>' for cell in row) + "</tr>\n" for row in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>'


def _pairs(pairs: Iterable[tuple[str, object]]) -> str:
    rows = "".join(f"<tr><th>{escape(str(key))}</th><td>{escape(str(value))}</td></tr>\n" for key, value in pairs)
    return f"<table>{rows}</table>"


def _as_mapping(hardware: Mapping[str, object] | str) -> Mapping[str, object]:
    return {"hardware": hardware} if isinstance(hardware, str) else hardware


def _picture(path: Path, description: str) -> str:
    """Return an image with its data inside, or nothing where it was not drawn."""
    if not path.is_file():
        return ""
    picture = path.read_bytes()
    # A PNG says its width at byte 16. Shown at the same scale, all pictures have letters of the same size.
    width = int.from_bytes(picture[16:20], "big") * CSS_DOTS_PER_INCH // DOTS_PER_INCH
    data = base64.b64encode(picture).decode("ascii")
    return f'<img alt="{escape(description)}" style="width: {width}px" src="data:image/png;base64,{data}">'
