"""A study: a question, and the runs that answer it."""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from gatewright.names import known


@dataclass(frozen=True)
class Arm:
    """One kind of run, of which there is one per seed.

    Args:
        name: Short name, which files and tables bear.
        about: What it is, in words.
        recipe: Recipe that is trained.
        flags: What it changes of the recipe, as one types it behind ``gatewright train RECIPE``.
        twin: Arm that it is compared with; None takes the study's.
    """

    name: str
    about: str
    recipe: str
    flags: str = ""
    twin: str | None = None


@dataclass(frozen=True, kw_only=True)
class Tier:
    """How long the runs of a study are, for what a reader has: a few minutes, a CPU, a GPU.

    Args:
        about: The machine and the time that it takes there.
        flags: What every arm of a recipe changes of it, by the recipe's name; an arm's own flags come after these.
        tuned: What single arms change further, such as a learning rate that suits each, by the arm's name.
        seeds: The seeds of every arm.
        arms: Names of the arms that are run; None runs all.
        alone: Whether its runs are run one at a time, since their seconds are what is asked for.
    """

    about: str
    flags: Mapping[str, str] = field(default_factory=dict)
    tuned: Mapping[str, str] = field(default_factory=dict)
    seeds: tuple[int, ...] = (0,)
    arms: tuple[str, ...] | None = None
    alone: bool = False


@dataclass(frozen=True, kw_only=True)
class Study:
    """A question, the arms whose runs answer it, and the tiers in which they are run.

    Args:
        name: The study's name, which its page and the folder of its results bear.
        question: What it asks, in whole sentences.
        twin: Name of the arm that others are compared with.
        arms: The arms, in the order of the tables.
        tiers: The tiers by name, as ``--budget`` names them.
        answer: What the results say, written by hand when they are there.

    Raises:
        ValueError: If arms have the same name, or a name is given of an arm or a recipe that is not there.
    """

    name: str
    question: str
    twin: str
    arms: tuple[Arm, ...]
    tiers: Mapping[str, Tier]
    answer: str = ""

    def __post_init__(self) -> None:
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            raise ValueError(f"The arms of a study have different names; {self.name} has {', '.join(sorted(names))}.")
        for arm in self.arms:
            known(self.twin_of(arm), names, f"arm of the study {self.name}")
        for tier in self.tiers.values():
            for name in (*(tier.arms or ()), *tier.tuned):
                known(name, names, f"arm of the study {self.name}")
            for recipe in tier.flags:
                known(recipe, [arm.recipe for arm in self.arms], f"recipe of the study {self.name}")

    def twin_of(self, arm: Arm) -> str:
        """Return the name of the arm that an arm is compared with, which may be its own."""
        return arm.twin or self.twin

    def arms_of(self, tier: Tier) -> tuple[Arm, ...]:
        """Return the arms that a tier runs."""
        return tuple(arm for arm in self.arms if tier.arms is None or arm.name in tier.arms)

    def flags(self, arm: Arm, tier: Tier) -> list[str]:
        """Return the words behind ``gatewright train RECIPE`` that make a run of an arm in a tier, but for its seed."""
        said = (tier.flags.get(arm.recipe, ""), arm.flags, tier.tuned.get(arm.name, ""))
        return [word for flags in said for word in shlex.split(flags)]
