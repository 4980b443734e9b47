"""What ``gatewright list`` does: print everything that a flag of train can choose, and what it is."""

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table

from gatewright.cli.flags import parse
from gatewright.models import CHOOSABLE_ROUTERS
from gatewright.models.transformer import CAUSAL_ROUTERS
from gatewright.recipes import RECIPES
from gatewright.studies import STUDIES

DATA_SETS: Mapping[str, str] = {
    "cifar10": "60,000 images of 32 x 32 in 10 classes: from the hub, or from --data.path.",
    "cifar100": "60,000 images of 32 x 32 in 100 classes: from the hub, or from --data.path.",
    "digits": "1,797 handwritten digits of 8 x 8, which scikit-learn brings.",
    "folder": "Your own images under --data.path, sorted by split and class or by class alone.",
    "OWNER/NAME": "Any image data set of the Hugging Face hub.",
}
EXPERTS: Mapping[str, str] = {
    "grouped": "Feed-forward networks with stacked weights, in place of the model's own experts.",
    "merged": "The model's own, merged into one for each item by the router's weights.",
    "modules": "The model's own, each with its rows.",
}
BESIDE: Mapping[str, str] = {
    "--model.residual": "One more expert takes every item, with a learned share of it and of the mixture.",
    "--model.shared": "One more expert is applied to every item, and added with weight 1.",
}
TEXTS: Mapping[str, str] = {
    "python": "The sources of Python's own standard library, which are where Python is.",
    "text": "Your own text under --data.path: a file, or a folder of files.",
    "OWNER/NAME": "Any data set of the Hugging Face hub with a column of text.",
}
DISPATCHERS: Mapping[str, str] = {
    "capacity": "In training each expert takes a bounded number of rows, and the rest are dropped.",
    "dropless": "Every row is computed. The router soft fills slots of a fixed number instead.",
}
LOSSES: Mapping[str, str] = {
    "importance": "Evens out the sum of the weights that each expert gets (Shazeer).",
    "load": "Evens out how many tokens each expert is likely to get (Shazeer).",
    "load_balance": "Evens out probabilities where the load is uneven (Switch).",
    "router_z": "Keeps the router's logits small (ST-MoE).",
    "threshold": "Teaches the router expert-choice the thresholds that it evaluates with.",
}


@dataclass(frozen=True)
class ListArguments:
    """Print recipes, data sets, routers, experts, dispatchers and losses, each with what it is."""


def list_command(words: list[str]) -> None:
    """Print what there is to choose from."""
    if words and words[0] not in ("-h", "--help"):
        raise ValueError(f"list takes no arguments; got {' '.join(words)}.")
    parse(ListArguments, words, prog="gatewright list")
    console = Console()
    for title, choices in {
        "gatewright train RECIPE": {name: _summary(recipe) for name, recipe in RECIPES.items()},
        "gatewright study NAME": {name: study.question for name, study in STUDIES.items()},
        "--data.name of images": DATA_SETS,
        "--data.name of text": TEXTS,
        "--model.router of images": {name: _summary(router) for name, router in CHOOSABLE_ROUTERS.items()},
        "--model.router of text": {name: _summary(router) for name, router in CAUSAL_ROUTERS.items()}
        | {"gated-hash": "As hashed, with weights from a learned gate."},
        "--model.experts": EXPERTS,
        "beside the experts": BESIDE,
        "--model.dispatch": DISPATCHERS,
        "--model.losses NAME COEFFICIENT": LOSSES,
    }.items():
        table = Table(title, "what it is", expand=True)
        for name, summary in choices.items():
            table.add_row(name, summary)
        table.columns[0].width = 31
        console.print(table)


def _summary(thing: object) -> str:
    """Return the first line of a docstring, without the link to a paper."""
    first = (thing.__doc__ or "").partition("\n")[0]
    return first.partition(": https://")[0].rstrip(".") + "."
