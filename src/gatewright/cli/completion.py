"""What ``gatewright completion`` does: print a script by which a shell completes commands, recipes and flags."""

from dataclasses import dataclass, make_dataclass
from typing import Annotated, Any, Literal

import tyro

from gatewright.cli.change import CHANGES
from gatewright.cli.compare import CompareArguments
from gatewright.cli.evaluate import EvaluateArguments
from gatewright.cli.export import ExportArguments
from gatewright.cli.flags import parse, registry
from gatewright.cli.generate import GenerateArguments
from gatewright.cli.listing import ListArguments
from gatewright.cli.plan import RecipeArguments
from gatewright.cli.predict import PredictArguments
from gatewright.cli.report import ReportArguments
from gatewright.cli.serve import ServeArguments
from gatewright.cli.study import StudyArguments
from gatewright.cli.train import TrainArguments
from gatewright.recipes import RECIPES
from gatewright.studies import STUDIES


@dataclass(frozen=True)
class CompletionArguments:
    """Print a script by which a shell completes gatewright's commands, recipes and flags.

    For bash: ``source <(gatewright completion bash)``. For zsh, a file ``_gatewright`` in a folder of ``$fpath``.

    Args:
        shell: The shell that the script is for.
    """

    shell: Annotated[tyro.conf.Positional[Literal["bash", "zsh", "fish"]], tyro.conf.arg(metavar="SHELL")]


def completion_command(words: list[str]) -> None:
    """Print the script of a shell, made from the very parsers that read the flags."""
    arguments = parse(CompletionArguments, words, prog="gatewright completion")
    configs = {name: recipe() for name, recipe in RECIPES.items()}
    trained = _choice({name: TrainArguments(config) for name, config in configs.items()})
    planned = _choice({name: RecipeArguments(run=config) for name, config in configs.items()})

    def train(recipe: Annotated[trained, tyro.conf.arg(name="")]) -> None: ...  # type: ignore[valid-type]
    def plan(recipe: Annotated[planned, tyro.conf.arg(name="")]) -> None: ...  # type: ignore[valid-type]

    studies = Literal[tuple(STUDIES)]  # type: ignore[valid-type]
    kind = Annotated[tyro.conf.Positional[studies], tyro.conf.arg(metavar="STUDY")]  # type: ignore[valid-type]
    study = make_dataclass(
        "StudyArguments", [("study", kind, next(iter(STUDIES)))], bases=(StudyArguments,), frozen=True
    )

    tyro.extras.subcommand_cli_from_dict(
        {
            **{name: flags for name, (_, flags) in CHANGES.items()},
            "compare": CompareArguments,
            "completion": CompletionArguments,
            "evaluate": EvaluateArguments,
            "export": ExportArguments,
            "generate": GenerateArguments,
            "list": ListArguments,
            "plan": plan,
            "predict": PredictArguments,
            "report": ReportArguments,
            "serve": ServeArguments,
            "study": study,
            "train": train,
        },
        prog="gatewright",
        args=["--tyro-write-completion", arguments.shell, "-"],
        config=(tyro.conf.AvoidSubcommands,),
        registry=registry(),
    )


def _choice(defaults: dict[str, Any]) -> Any:
    """Make a type of which the parser reads one by its name."""
    return tyro.extras.subcommand_type_from_defaults(defaults, prefix_names=False)
