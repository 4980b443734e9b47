"""What a model is trained for: a task builds the model for its data, and makes a loss and an evaluation of batches."""

from gatewright.names import imported, known
from gatewright.tasks.base import Batch, DataSplit, Forward, Splits, Task
from gatewright.tasks.classification import Classification, ClassificationEvaluation, mirrored_too
from gatewright.tasks.decision import EXACT, FROM_HERE, ROUNDING, Change, Decision, Rule, refused
from gatewright.tasks.evaluation import Evaluation, LayerUse, Table, class_by_expert
from gatewright.tasks.language_model import LanguageModel, LanguageModelEvaluation, generate
from gatewright.tasks.spans import expert_spans

TASKS: dict[str, Task] = {"classification": Classification(), "language_model": LanguageModel()}
"""Every task of the package by name. A program's own is named by where it is: ``"regression.task:Regression"``."""


def task_named(name: str) -> Task:
    """Return a task by its name, or one of your own by its module and class: ``"module:Class"``.

    Raises:
        ValueError: If there is none; the sentence names the nearest.
    """
    if ":" not in name:
        return TASKS[known(name, TASKS, "task")]
    found = imported(name, "task")
    if not (isinstance(found, type) and issubclass(found, Task)):
        raise ValueError(f"A task is named as module:Class, of a class that is a gatewright.tasks.Task; got {name!r}.")
    return found()


__all__ = [
    "EXACT",
    "FROM_HERE",
    "ROUNDING",
    "TASKS",
    "Batch",
    "Change",
    "Classification",
    "ClassificationEvaluation",
    "DataSplit",
    "Decision",
    "Evaluation",
    "Forward",
    "LanguageModel",
    "LanguageModelEvaluation",
    "LayerUse",
    "Rule",
    "Splits",
    "Table",
    "Task",
    "class_by_expert",
    "expert_spans",
    "generate",
    "mirrored_too",
    "refused",
    "task_named",
]
