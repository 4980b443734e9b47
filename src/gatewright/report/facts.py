"""What the tables and the page say about a run, in words and numbers."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from jaxtyping import Int, Real
from torch import Tensor

NUM_FAVOURITES = 3
# What the columns are called.
LOAD = "share of the load"
FAVOURITES = "favourite classes, and the share of their images that reaches it"


@dataclass(frozen=True, kw_only=True)
class ExpertFacts:
    """One expert of one layer.

    Args:
        index: Its position in the layer.
        share: Its share of all assignments, in [0, 1].
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
    def favourites_text(self) -> str:
        """The favourites in one line."""
        return ", ".join(f"{name} {share:.0%}" for name, share in self.favourites)


def expert_facts(
    tokens_per_expert: Real[Tensor, " experts"],
    class_by_expert: Real[Tensor, "classes experts"] | None,
    tokens_per_class: Int[Tensor, " classes"] | None,
    class_names: Sequence[str],
) -> list[ExpertFacts]:
    """Say of each expert how much it gets, and the up to three classes of whose images it gets the largest share.

    Args:
        tokens_per_expert: Assignments.
        class_by_expert: Assignments of each class's images, where the classes are known.
        tokens_per_class: Tokens of each class's images; the images themselves where they are routed as a whole.
        class_names: In the order of the rows of `class_by_expert`.
    """
    shares = (tokens_per_expert / tokens_per_expert.sum().clamp(min=1)).tolist()
    favourites: list[tuple[tuple[str, float], ...]] = [()] * len(shares)
    if class_by_expert is not None and tokens_per_class is not None:
        by_class = class_by_expert / tokens_per_class[:, None].clamp(min=1)
        favourites = [_favourites(column, class_names) for column in by_class.T.tolist()]
    return [ExpertFacts(index=index, share=share, favourites=favourites[index]) for index, share in enumerate(shares)]


def _favourites(shares: Sequence[float], class_names: Sequence[str]) -> tuple[tuple[str, float], ...]:
    ranking = sorted(zip(class_names, shares, strict=True), key=lambda pair: -pair[1])
    return tuple((name, share) for name, share in ranking[:NUM_FAVOURITES] if share >= 0.005)


def result_facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the (label, value) pairs that sum up a `result.json`."""
    parameters = f"{result['num_parameters']:,}, of which {result['num_active_parameters']:,} work on an image"
    facts = [
        ("recipe", f"{result['recipe']}, seed {result['seed']}"),
        ("test accuracy", f"{result['test_accuracy']:.2%}"),
        ("training", f"{result['epochs']} epochs in {duration(result['train_seconds'])}"),
        ("parameters", parameters),
        ("arithmetic", f"{result['active_flops_per_image'] / 1e6:,.3g} million operations per image"),
    ]
    return facts + [(f"layer {name}", layer_summary(layer)) for name, layer in result["layers"].items()]


def layer_summary(layer: Mapping[str, Any]) -> str:
    """Say in one line how evenly a layer's experts are used."""
    num_experts, num_dead = len(layer["tokens_per_expert"]), len(layer["dead_experts"])
    return (
        f"{num_experts} experts, {num_dead or 'none'} dead; busiest {layer['max_over_mean_load']:.2f} times the mean, "
        f"load CV {layer['load_cv']:.2f}; {layer['dropped_fraction']:.1%} dropped"
    )


def duration(seconds: float) -> str:
    """Write a time the way people say it."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {seconds} s"
