"""What a model is trained for: a task builds the model for its data, and makes a loss and an evaluation of batches."""

from gatewright.names import known
from gatewright.tasks.base import Batch, DataSplit, Splits, Task
from gatewright.tasks.classification import (
    Classification,
    ClassificationEvaluation,
    check_same_images,
    mirrored_too,
)
from gatewright.tasks.evaluation import Evaluation, LayerUse, class_by_expert
from gatewright.tasks.language_model import LanguageModel, LanguageModelEvaluation, generate
from gatewright.tasks.spans import expert_spans

TASKS: dict[str, Task] = {"classification": Classification(), "language_model": LanguageModel()}
"""Every task by name. A program adds its own: ``TASKS["regression"] = Regression()``."""


def task_named(name: str) -> Task:
    """Return a task by its name.

    Raises:
        ValueError: If there is none; the sentence names the nearest.
    """
    return TASKS[known(name, TASKS, "task")]


__all__ = [
    "TASKS",
    "Batch",
    "Classification",
    "ClassificationEvaluation",
    "DataSplit",
    "Evaluation",
    "LanguageModel",
    "LanguageModelEvaluation",
    "LayerUse",
    "Splits",
    "Task",
    "check_same_images",
    "class_by_expert",
    "expert_spans",
    "generate",
    "mirrored_too",
    "task_named",
]
