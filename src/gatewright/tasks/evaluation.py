"""What an evaluation is made of: what a model's mixture layers did, by the class of what they did it to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Int, Real
from torch import Tensor

from gatewright.routing import Routing
from gatewright.routing_sums import RoutingSums


@dataclass(frozen=True)
class LayerUse:
    """How a set of items used one MoE layer.

    Args:
        sums: The routing's sums over the whole set.
        class_by_expert: Assignments of each class's items to each expert; of `SoftMoE`, sums of weights.
        tokens_per_class: Tokens of each class's items: the items themselves where they are routed as a whole.
    """

    sums: RoutingSums
    class_by_expert: Real[Tensor, "classes experts"]
    tokens_per_class: Int[Tensor, " classes"]

    @classmethod
    def of(cls, routing: Routing, labels: Int[Tensor, " items"], num_classes: int) -> Self:
        """Count what a layer did with one batch, of whose items each has a class."""
        seen = class_by_expert(routing, labels.to(routing.sums.load.device), num_classes)
        tokens = labels.bincount(minlength=num_classes) * _tokens_per_item(routing, labels)
        return cls(routing.sums, seen, tokens.cpu())

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every sum, all of them additive."""
        return (
            *self.sums.by_name().values(),
            self.class_by_expert,
            self.tokens_per_class,
        )

    def __add__(self, other: Self) -> Self:
        """Add the use by another batch."""
        return type(self)(
            self.sums + other.sums,
            self.class_by_expert + other.class_by_expert,
            self.tokens_per_class + other.tokens_per_class,
        )


@dataclass(frozen=True)
class Table:
    """What there is to see in an evaluation, beside its metrics and its experts.

    Args:
        title: The heading.
        columns: The names of the columns.
        rows: A cell for each column.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Evaluation(ABC):
    """What a model makes of a set of items; each task says what there is to know beside its experts.

    Args:
        layers: The use of each MoE layer, by its name in the model.
    """

    layers: Mapping[str, LayerUse]
    higher_is_better: ClassVar[bool] = False
    """Whether the better of two models has the higher headline, as an accuracy is, and not the lower, as a loss."""

    @property
    @abstractmethod
    def metrics(self) -> dict[str, float]:
        """The numbers to track, by short names such as ``"loss"``."""

    @property
    @abstractmethod
    def headline(self) -> tuple[str, str]:
        """The one figure that a model is judged by, its name and its value in words: ``("accuracy", "97.20%")``."""

    def tables(self) -> Sequence[Table]:
        """Return what is to be shown beside metrics and experts, on the terminal and the page of the run."""
        return ()

    def describe(self) -> dict[str, Any]:
        """Return what ``result.json`` says of the test set beside the experts: by default the metrics and the tables.

        The page of a run is made of this alone.
        """
        found = {f"test_{name}": value for name, value in self.metrics.items()}
        return found | ({"tables": [asdict(table) for table in tables]} if (tables := self.tables()) else {})


def class_by_expert(
    routing: Routing, labels: Int[Tensor, " items"], num_classes: int
) -> Real[Tensor, "classes experts"]:
    """Count assignments by the class of their item and by expert, or add up weights; an item may be many tokens."""
    tokens_per_item = max(_tokens_per_item(routing, labels), 1)
    by_weight = routing.sums.tokens_per_expert.is_floating_point()  # of a router that sends every token everywhere
    counted = routing.weight if by_weight else torch.ones_like(routing.expert_index)
    cells = counted.new_zeros(num_classes, routing.num_experts + 1)
    place = (labels[routing.token_index // tokens_per_item], routing.expert_index)
    return cells.index_put(place, counted, accumulate=True)[:, :-1].cpu()


def _tokens_per_item(routing: Routing, labels: Int[Tensor, " items"]) -> int:
    return int(routing.sums.num_tokens) // max(len(labels), 1)
