"""The runs of a study in a tier, before any of them begins."""

from dataclasses import dataclass
from pathlib import Path

from gatewright.studies.study import Arm
from gatewright.train import RunConfig


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run of a study.

    Args:
        study: Name of the study.
        tier: Name of the tier.
        arm: The arm that it is of.
        config: The run's settings, its seed and its folder among them.
        words: What is typed behind ``gatewright train`` for it.
        file: File in which its result is kept.
    """

    study: str
    tier: str
    arm: Arm
    config: RunConfig
    words: tuple[str, ...]
    file: Path

    @property
    def folder(self) -> Path:
        """The run's own folder."""
        return Path(str(self.config.output))

    @property
    def title(self) -> str:
        """The arm and the seed."""
        return f"{self.arm.name}, seed {self.config.seed}"
