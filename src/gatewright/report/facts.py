"""What the tables and the page say about a run, in words and numbers."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Int, Real
from torch import Tensor

NUM_FAVOURITES = 3
ONE_CLASS = 0.99
"""Share of an expert's assignments that are of one class, from which on it sees only that class."""
BUSY = 2.0
"""Times the mean load from which on an expert is called busy."""
NO_BREAK = "\N{NO-BREAK SPACE}"
# What the columns are called.
LOAD = "share of the load"
# What a layer is, by the name of its class; a layer of another library goes by that name itself.
KINDS = {"MoE": "Mixture of experts", "SoftMoE": "Soft mixture of experts", "MergedMoE": "Merged experts"}


@dataclass(frozen=True, kw_only=True)
class ExpertFacts:
    """One expert of one layer.

    Args:
        index: Position of the expert in the layer.
        share: The expert's share of all assignments, in [0, 1].
        favourites: (class, share of that class's images that reach the expert), the largest first. An image that goes
            to two experts counts for both, so a class's shares add up to its experts per image.
    """

    index: int
    share: float
    favourites: tuple[tuple[str, float], ...]

    @property
    def dead(self) -> bool:
        """Whether it got nothing at all."""
        return self.share == 0

    @property
    def share_text(self) -> str:
        """The share in percent, where a little is not nothing."""
        return "<0.1%" if 0 < self.share < 0.0005 else f"{self.share:.1%}"

    @property
    def favourites_text(self) -> str:
        """The favourites in one line, which does not break within one of them."""
        said = (f"{class_label(name)} {share:.0%}".replace(" ", NO_BREAK) for name, share in self.favourites)
        return ", ".join(said)


def favourites_heading(item: str) -> str:
    """Return what the column of the favourites is called, where the classes are classes of these items."""
    return f"favourite {'kinds' if item == 'byte' else 'classes'}, and the share of their {item}s that reaches it"


def class_label(name: str) -> str:
    """Say that a number is the name of a class, where it could be read as a number."""
    return f"class {name}" if name.isnumeric() else name


def article(noun: str) -> str:
    """Put the indefinite article before a noun."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def count(number: int, noun: str) -> str:
    """Write a number with its noun, in the plural but for one."""
    return f"{number:,} {noun}" + ("" if number == 1 else "s")


def expert_facts(
    tokens_per_expert: Real[Tensor, " experts"],
    class_by_expert: Real[Tensor, "classes experts"] | None,
    tokens_per_class: Int[Tensor, " classes"] | None,
    class_names: Sequence[str],
) -> list[ExpertFacts]:
    """Say of each expert how much it gets, and the up to three classes of whose images it gets the largest share.

    Args:
        tokens_per_expert: Assignments to each expert.
        class_by_expert: Assignments of each class's images, where the classes are known.
        tokens_per_class: Tokens of each class's images; the images themselves where they are routed as a whole.
        class_names: Names of the classes, in the order of the rows of `class_by_expert`.
    """
    shares = (tokens_per_expert / tokens_per_expert.sum().clamp(min=1)).tolist()
    favourites: list[tuple[tuple[str, float], ...]] = [()] * len(shares)
    if class_by_expert is not None and tokens_per_class is not None:
        by_class = class_by_expert / tokens_per_class[:, None].clamp(min=1)
        favourites = [_favourites(column, class_names) for column in by_class.T.tolist()]
    return [ExpertFacts(index=index, share=share, favourites=favourites[index]) for index, share in enumerate(shares)]


def experts_of(layer: Mapping[str, Any], class_names: Sequence[str]) -> list[ExpertFacts]:
    """Say of each expert of a layer in a `result.json` what `expert_facts` does."""
    tokens, by_class = counts_by_class(layer)
    return expert_facts(torch.tensor(layer["tokens_per_expert"]), by_class, tokens, class_names)


def counts_by_class(layer: Mapping[str, Any]) -> tuple[Tensor | None, Tensor | None]:
    """Return a layer's tokens of each class, and the assignments of each class to each expert, where they are known."""
    counts = layer["class_by_expert"]
    return (torch.tensor(layer["tokens_per_class"]), torch.tensor(counts)) if counts else (None, None)


def _favourites(shares: Sequence[float], class_names: Sequence[str]) -> tuple[tuple[str, float], ...]:
    ranking = sorted(zip(class_names, shares, strict=True), key=lambda pair: -pair[1])
    return tuple((name, share) for name, share in ranking[:NUM_FAVOURITES] if share >= 0.005)


def result_facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the (label, value) pairs that sum up a `result.json`."""
    item = item_of(result)
    active = f"{result['num_active_parameters']:,} work on {article(item)}"
    parameters = f"{result['num_parameters']:,}, of which {active}"
    facts = [("recipe", f"{result['recipe']}, seed {result['seed']}")]
    facts += [("data", data_summary(result["data"], item))] if "data" in result else []
    facts += (
        [("changed from the recipe", changes_summary(result["changes"]))] if result.get("changes") is not None else []
    )
    facts += [("changed on resuming", " ".join(result["resumed_with"]))] if result.get("resumed_with") else []
    facts += [
        test_headline(result),
        ("training", f"{count(result['epochs'], 'epoch')} in {duration(result['train_seconds'])}"),
        ("parameters", parameters),
        ("arithmetic", f"{result[f'active_flops_per_{item}'] / 1e6:,.3g} million operations per {item}"),
    ]
    return facts + [
        (f"experts of {name}", f"{layer_summary(layer)} (test set)") for name, layer in result["layers"].items()
    ]


def item_of(result: Mapping[str, Any]) -> str:
    """Return what the data consist of, in the singular; a result of version 0.1.0 is of images."""
    return str(result.get("item", "image"))


def class_names_of(result: Mapping[str, Any]) -> list[str]:
    """Return the names of the classes by which the work of experts is told apart."""
    return list(result.get("class_names") or result["test_accuracy_per_class"])


def class_word(result: Mapping[str, Any]) -> str:
    """Return what such a class is called: images are of a class, and bytes of a kind."""
    return "kind" if item_of(result) == "byte" else "class"


def test_headline(result: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name and the value of the figure that the run is judged by."""
    name, value = result.get("test_headline") or ("accuracy", f"{result['test_accuracy']:.2%}")
    return f"test {name}", value


def data_summary(data: Sequence[Mapping[str, Any]], item: str = "image") -> str:
    """Say which data the run used, and where they came from."""
    parts = ", ".join(f"{part.get('num_items', part.get('num_images')):,} {part['split']}" for part in data)
    return f"{data[0]['name']} ({data[0]['source']}): {parts} {item}s"


def changes_summary(changes: Mapping[str, Mapping[str, Any]]) -> str:
    """Say which settings are not the recipe's own, and what these are."""
    said = (f"{name} {change['run']} (recipe: {change['recipe']})" for name, change in changes.items())
    return "; ".join(said) or "nothing"


def layer_kind(layer: Mapping[str, Any]) -> str:
    """Say what a layer with a router is."""
    name: str = layer.get("layer", "MoE")
    return KINDS.get(name, name)


def routing_summary(layer: Mapping[str, Any], num_items: int, item: str = "image") -> str:
    """Say what a layer's router does, where the result names the router."""
    if "router" not in layer:
        return ""
    num_tokens = sum(layer["tokens_per_class"] or [0]) // max(num_items, 1)
    routed = item if num_tokens <= 1 or not num_items else f"token, of which each {item} has {num_tokens}"
    num_experts = count(len(layer["tokens_per_expert"]), "expert")
    return f"Router {layer['router']}: {layer['top_k']} of {num_experts} for each {routed}."


def health(layers: Sequence[Mapping[str, Any]]) -> str:
    """Say in one line whether the test set uses the experts of some layers well: of each figure, the worst."""
    sizes = sorted({len(layer["tokens_per_expert"]) for layer in layers})
    experts = (
        " or ".join(f"{size:,}" for size in sizes[:-1]) + (" or " if sizes[1:] else "") + count(sizes[-1], "expert")
    )
    dropped = max(layer["dropped_fraction"] for layer in layers)
    return (
        f"{count(len(layers), 'layer') + ' of ' if layers[1:] else ''}{experts}, "
        f"{sum(len(layer['dead_experts']) for layer in layers)} dead, "
        f"busiest {max(layer['max_over_mean_load'] for layer in layers):.1f} times the mean, "
        f"{f'{dropped:.1%}' if dropped else 'nothing'} dropped"
    )


def layer_summary(layer: Mapping[str, Any]) -> str:
    """Say in one line how evenly the test set uses a layer's experts."""
    return f"{health([layer])}; load CV {layer['load_cv']:.2f}"


def warnings(result: Mapping[str, Any]) -> list[str]:
    """Say in words what is worth a look in the experts of a run, by the test set."""
    item, names = item_of(result), class_names_of(result)
    return [
        f"Expert {index} of {name} {what}."
        for name, layer in result["layers"].items()
        for index, what in enumerate(_oddities(layer, item, names))
        if what
    ]


def _oddities(layer: Mapping[str, Any], item: str, class_names: Sequence[str]) -> Iterator[str]:
    """Yield what is odd about each expert, or nothing."""
    tokens, by_class = layer["tokens_per_expert"], layer["class_by_expert"]
    mean = sum(tokens) / len(tokens)
    for index, number in enumerate(tokens):
        seen = [row[index] for row in by_class or []]
        if number == 0:
            yield f"is dead: no test {item} reaches it"
        elif len(class_names) > 1 and max(seen, default=0) >= ONE_CLASS * number:
            yield f"sees only {item}s of {class_label(class_names[seen.index(max(seen))])}"
        elif number >= BUSY * mean:
            yield f"is busy: it gets {number / mean:.1f} times the mean load"
        else:
            yield ""


def duration(seconds: float) -> str:
    """Write a time the way people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
