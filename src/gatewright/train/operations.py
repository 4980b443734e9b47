"""The operations of `gatewright.surgery` that change a finished run, each with its settings."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import torch
from pydantic import Field, NonNegativeFloat, PositiveInt
from torch import Tensor, nn
from torch.optim import Optimizer

from gatewright.models import MixtureConfig
from gatewright.settings import settings
from gatewright.surgery import densify, grow, merge, prune, select

Score = Literal["contribution", "load"]

Measure = Callable[[Score], Mapping[str, Tensor]]
"""Measures the experts of every mixture by a score, as `gatewright.surgery.expert_scores` does."""


@settings()
class Operation(ABC):
    """A change of the experts of every mixture of a model."""

    @abstractmethod
    def network(self, model: MixtureConfig) -> MixtureConfig:
        """Return the settings of the changed network."""

    @abstractmethod
    def apply(self, model: nn.Module, measure: Measure, optimizers: Sequence[Optimizer]) -> dict[str, str]:
        """Change a model in place, with its optimizers, and say by layer what became of the experts."""


@settings()
class Prune(Operation):
    """Leave experts out of every mixture.

    Args:
        num_experts: Number of experts to keep in each mixture: those of the highest scores.
        keep: Indices of the experts to keep, in place of a number.
        by: The score: `contribution` is the mean of an expert's weight times the length of its output over its tokens,
            and `load` its share of the assignments. Both are measured on training data.
    """

    num_experts: PositiveInt | None = None
    keep: tuple[int, ...] = ()
    by: Score = "contribution"

    def __post_init__(self) -> None:
        if bool(self.keep) == bool(self.num_experts):
            raise ValueError(
                "Either `num_experts` says how many experts to keep, or `keep` which ones; got "
                f"num_experts={self.num_experts} and keep={list(self.keep)}. Give one of them."
            )

    def network(self, model: MixtureConfig) -> MixtureConfig:
        """Return the settings with fewer experts."""
        return model.with_experts(self.num_experts or len(self.keep))

    def apply(self, model: nn.Module, measure: Measure, optimizers: Sequence[Optimizer]) -> dict[str, str]:
        """Keep the experts that are named, or those of the highest scores."""
        if self.num_experts is None:
            select(model, self.keep, optimizer=optimizers)
            return {"every mixture": f"kept {_list(self.keep)}"}
        removed = prune(model, self.num_experts, measure(self.by), optimizer=optimizers)
        return {name: f"left out {_list(experts) or 'none'} by {self.by}" for name, experts in removed.items()}


@settings()
class Merge(Operation):
    """Merge the most alike experts of every mixture.

    Args:
        num_experts: Number of experts of each mixture afterwards.
    """

    num_experts: PositiveInt

    def network(self, model: MixtureConfig) -> MixtureConfig:
        """Return the settings with fewer experts."""
        return model.with_experts(self.num_experts)

    def apply(self, model: nn.Module, measure: Measure, optimizers: Sequence[Optimizer]) -> dict[str, str]:
        """Make the most alike experts their mean."""
        merged = merge(model, self.num_experts, optimizer=optimizers)
        return {name: f"now {', '.join('+'.join(map(str, each)) for each in made)}" for name, made in merged.items()}


@settings()
class Grow(Operation):
    """Give every mixture more experts, copies of those that it has.

    Args:
        num_experts: Number of experts of each mixture afterwards.
        top_k: Experts per item afterwards; by default as before.
        noise: Standard deviation of the noise on the copies, as a share of that of each parameter's values.
    """

    num_experts: Annotated[PositiveInt, Field(gt=1)]
    top_k: PositiveInt | None = None
    noise: NonNegativeFloat = 0.0

    def network(self, model: MixtureConfig) -> MixtureConfig:
        """Return the settings with more experts."""
        return model.with_experts(self.num_experts, self.top_k)

    def apply(self, model: nn.Module, measure: Measure, optimizers: Sequence[Optimizer]) -> dict[str, str]:
        """Copy the experts in turn; equal runs draw equal noise."""
        generator = torch.Generator().manual_seed(0)
        options = (model, self.num_experts)
        grow(*options, top_k=self.top_k, noise=self.noise, generator=generator, optimizer=optimizers)
        return {"every mixture": f"{self.num_experts} experts, copied in turn"}


@settings()
class Densify(Operation):
    """Put the mean of all experts in place of every mixture.

    Args:
        by: The score that weighs the experts in the mean, measured on training data.
    """

    by: Score = "load"

    def network(self, model: MixtureConfig) -> MixtureConfig:
        """Return the settings of the dense twin."""
        return model.with_experts(1)

    def apply(self, model: nn.Module, measure: Measure, optimizers: Sequence[Optimizer]) -> dict[str, str]:
        """Replace the mixtures; the optimizers go on with all other parameters."""
        densify(model, measure(self.by))
        return {"every mixture": "the mean of its experts"}


def _list(experts: Sequence[int]) -> str:
    return ", ".join(map(str, experts))
