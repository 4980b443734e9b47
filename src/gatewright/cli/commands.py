"""The commands by name."""

from collections.abc import Callable, Mapping
from functools import partial

from gatewright.cli.change import change_command
from gatewright.cli.compare import compare_command
from gatewright.cli.completion import completion_command
from gatewright.cli.evaluate import evaluate_command
from gatewright.cli.export import export_command
from gatewright.cli.generate import generate_command
from gatewright.cli.listing import list_command
from gatewright.cli.plan import plan_command
from gatewright.cli.predict import predict_command
from gatewright.cli.report import report_command
from gatewright.cli.serve import serve_command
from gatewright.cli.study import study_command
from gatewright.cli.train import train_command

COMMANDS: Mapping[str, Callable[[list[str]], int | None]] = {
    "compare": compare_command,
    "completion": completion_command,
    "densify": partial(change_command, "densify"),
    "evaluate": evaluate_command,
    "export": export_command,
    "generate": generate_command,
    "grow": partial(change_command, "grow"),
    "list": list_command,
    "merge": partial(change_command, "merge"),
    "plan": plan_command,
    "predict": predict_command,
    "prune": partial(change_command, "prune"),
    "report": report_command,
    "serve": serve_command,
    "study": study_command,
    "train": train_command,
}
"""Every command by name; one may return an exit status, and None is 0."""
