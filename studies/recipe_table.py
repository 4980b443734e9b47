"""The recipe table of the README: ``python studies/recipe_table.py studies/results``.

The runs behind it, one after another on an otherwise idle machine (`studies/run_recipes.sh`)::

    gatewright train RECIPE --seed SEED --output runs/RECIPE-SEED --data.path FOLDER
"""

import json
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any


def read_results(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Group the results in a folder by recipe."""
    by_recipe: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text(encoding="utf-8"))
        by_recipe[result["recipe"]].append(result)
    return by_recipe


def table(by_recipe: dict[str, list[dict[str, Any]]]) -> str:
    """Return a Markdown table with one row per recipe."""
    figures = "test accuracy or bits per byte | seeds | train time | parameters (active) | load: least to most | dead"
    lines = [f"| recipe | {figures} |", "|---|---|---|---|---|---|---|"]
    lines += [_row(recipe, results) for recipe, results in sorted(by_recipe.items())]
    return "\n".join(lines)


def _row(recipe: str, results: list[dict[str, Any]]) -> str:
    bits = [result["test_bits_per_byte"] for result in results if "test_bits_per_byte" in result]
    figures = bits or [100 * result["test_accuracy"] for result in results]
    digits, unit = (3, "bits") if bits else (2, "%")
    spread = f" ± {stdev(figures):.{digits}f}" if len(figures) > 1 else ""
    seconds = [result["train_seconds"] for result in results]
    times = " to ".join(sorted({f"{second:.0f}" for second in (min(seconds), max(seconds))}, key=int))
    seeds = ", ".join(str(result["seed"]) for result in results)
    first = results[0]
    parameters = f"{first['num_parameters']:,} ({first['num_active_parameters']:,})"
    figure = f"{mean(figures):.{digits}f} {unit}{spread}"
    return f"| `{recipe}` | {figure} | {seeds} | {times} s | {parameters} | {_loads(results)} |"


def _loads(results: list[dict[str, Any]]) -> str:
    layers = [layer for result in results for layer in result["layers"].values()]
    if not layers:
        return "one expert | "
    shares = [count / sum(layer["tokens_per_expert"]) for layer in layers for count in layer["tokens_per_expert"]]
    return f"{min(shares):.1%} to {max(shares):.1%} | {sum(len(layer['dead_experts']) for layer in layers)}"


if __name__ == "__main__":
    print(table(read_results(Path(sys.argv[1]))))
