"""Studies: questions about mixtures of experts, and the runs that answer them, each in a file that says both."""

from collections.abc import Mapping
from types import MappingProxyType

from gatewright.names import imported, known
from gatewright.studies.balance import BALANCE
from gatewright.studies.experts import EXPERTS
from gatewright.studies.images import IMAGES
from gatewright.studies.language import LANGUAGE
from gatewright.studies.repair import REPAIR
from gatewright.studies.routers import ROUTERS
from gatewright.studies.speedrun import SPEEDRUN
from gatewright.studies.study import Arm, Study, Tier

STUDIES: Mapping[str, Study] = MappingProxyType(
    {study.name: study for study in (BALANCE, EXPERTS, IMAGES, LANGUAGE, REPAIR, ROUTERS, SPEEDRUN)}
)
"""Every study by name."""


def study_named(name: str) -> Study:
    """Return a study by its name, or one of your own by module and function: ``"module:function"``.

    Raises:
        ValueError: If there is none; the sentence names the nearest.
    """
    if ":" not in name:
        return STUDIES[known(name, STUDIES, "study")]
    study = imported(name, "study")()
    if not isinstance(study, Study):
        raise ValueError(f"A study is a function that returns a Study; {name} returned {type(study).__name__}.")
    return study


__all__ = [
    "BALANCE",
    "EXPERTS",
    "IMAGES",
    "LANGUAGE",
    "REPAIR",
    "ROUTERS",
    "SPEEDRUN",
    "STUDIES",
    "Arm",
    "Study",
    "Tier",
    "study_named",
]
