"""What ``gatewright study`` does: the runs of a study, what is kept of each, and the page about them."""

import os
import sys
import textwrap
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro

from gatewright.cli.flags import flags_of, parse, refuse_unknown_flags
from gatewright.cli.train import parse_train
from gatewright.data import BatchConfig
from gatewright.names import known
from gatewright.recipes import recipe_named
from gatewright.report.facts import count
from gatewright.studies import STUDIES, Arm, Study, Tier, study_named
from gatewright.studies.grid import Grid
from gatewright.studies.kept import changes
from gatewright.studies.page import write_page
from gatewright.studies.plan import PlannedRun
from gatewright.tasks import task_named
from gatewright.train import RunConfig
from gatewright.train.device import expected_device
from gatewright.train.folder import check_output
from gatewright.train.validate import check_upcycling, validate

HUB = "Hugging Face hub"
LINE = 100


@dataclass(frozen=True)
class StudyArguments:
    """Train the runs of a study, as many as are not kept yet, and write its page.

    Args:
        study: Name of the study, or module:function of one of your own; without one the studies are listed.
        budget: The tier: how long it may take, and on what.
        jobs: Runs at once.
        threads: Threads of each run; by default the cores are shared out.
        arms: Arms to run; by default all of the tier.
        seeds: Seeds to run; by default those of the tier.
        data_path: Folder of parquet files for the recipes whose data come from the hub.
        device: Device of every run; by default each takes a GPU where there is one.
        results: Folder in which the results are kept.
        output: Folder of the runs.
        pages: Folder of the pages.
        page: Write the page from what is kept, and run nothing.
    """

    study: Annotated[tyro.conf.Positional[str], tyro.conf.arg(metavar="[STUDY]")] = ""
    budget: str = "cpu"
    jobs: int = 1
    threads: int | None = None
    arms: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()
    data_path: str | None = None
    device: str | None = None
    results: Path = Path("studies/results")
    output: Path = Path("runs")
    pages: Path = Path("docs/results")
    page: bool = False


def study_command(words: list[str]) -> int:
    """Run what is not kept yet of a study, and write its page."""
    refuse_unknown_flags(words, flags_of(StudyArguments()))
    arguments = parse(StudyArguments, words, prog="gatewright study")
    if not arguments.study:
        list_studies()
        return 0
    study = study_named(arguments.study)
    failed = [] if arguments.page else _run(study, arguments)
    if failed:
        print(f"{len(failed)} failed: {'; '.join(run.title for run in failed)}", file=sys.stderr)
    print(write_page(study, arguments.results, arguments.pages))
    return 1 if failed else 0


def list_studies() -> None:
    """Print every study with its question, and how long its tiers take."""
    for name, study in STUDIES.items():
        print(f"gatewright study {name}")
        print(textwrap.fill(study.question, LINE, initial_indent="    ", subsequent_indent="    "))
        for tier, each in study.tiers.items():
            print(f"    --budget {tier:<9} {each.about}")
        print()


def _run(study: Study, arguments: StudyArguments) -> list[PlannedRun]:
    """Run what is not kept yet, and return what failed."""
    tier = study.tiers[known(arguments.budget, study.tiers, f"tier of the study {study.name}")]
    _check(tier, arguments)
    runs = planned_runs(study, tier, arguments)
    _check_changes(runs)
    todo = [run for run in runs if not run.file.is_file()]
    print(
        f"{study.name}: {len(runs)} runs, of which {len(runs) - len(todo)} are kept in {arguments.results}", flush=True
    )
    threads = arguments.threads or max(1, (os.cpu_count() or 1) // arguments.jobs)
    return Grid(todo, arguments.jobs, threads).run()


def _check(tier: Tier, arguments: StudyArguments) -> None:
    if arguments.jobs < 1 or (arguments.threads or 1) < 1:
        raise ValueError(f"--jobs and --threads are 1 or more; got {arguments.jobs} and {arguments.threads}.")
    if tier.alone and arguments.jobs > 1:
        raise ValueError(
            f"The tier {arguments.budget} compares seconds, so its runs are run one at a time; got --jobs "
            f"{arguments.jobs}. Leave --jobs out."
        )


def planned_runs(study: Study, tier: Tier, arguments: StudyArguments) -> list[PlannedRun]:
    """Return the runs that are asked for, seed by seed, each with settings that can be trained.

    Raises:
        OSError: If the folder of a run is not what it has to be.
        ValueError: If an arm's flags are wrong; the sentence names the arm.
    """
    arms = {arm.name: arm for arm in study.arms_of(tier)}
    wanted = [arms[known(name, arms, f"arm of the tier {arguments.budget}")] for name in arguments.arms or arms]
    settings = [(arm, *settings_of(study, arm, tier, arguments)) for arm in wanted]
    _check_data([config for *_, config in settings])
    seeds = arguments.seeds or tier.seeds
    return [planned_run(study, *each, seed, arguments) for seed in seeds for each in settings]


def settings_of(study: Study, arm: Arm, tier: Tier, arguments: StudyArguments) -> tuple[list[str], RunConfig]:
    """Return the flags of an arm's runs, and the settings that they make.

    Raises:
        ValueError: If its flags are wrong; the sentence names the arm.
    """
    words = [*study.flags(arm, tier), "--tracking.no-enabled"]
    words += ["--device", arguments.device] if arguments.device else []
    try:
        recipe = recipe_named(arm.recipe)
        if arguments.data_path and getattr(recipe.data, "source", None) == HUB:
            words += ["--data.path", arguments.data_path]
        config = parse_train(recipe, words).run
        validate(config, config.processes, expected_device(config.device, config.processes))
        check_upcycling(config, 0)
    except ValueError as error:
        raise ValueError(f"The arm {arm.name} of the study {study.name}: {error}") from error
    return words, config


def _check_data(configs: list[RunConfig]) -> None:
    """Refuse folders of data that are not what they have to be; those that several arms share are looked at once."""
    checked: list[BatchConfig] = []
    for config in configs:
        if config.data not in checked:
            task_named(config.task).check_data(config.data)
            checked.append(config.data)


def planned_run(
    study: Study, arm: Arm, words: list[str], config: RunConfig, seed: int, arguments: StudyArguments
) -> PlannedRun:
    """Return the run of an arm and a seed, in a folder that no other run is in."""
    place, name = Path(study.name) / arguments.budget, f"{arm.name}-{seed}"
    output = str(arguments.output / place / name)
    config = replace(config, seed=seed, output=output)
    check_output(config, resume=(Path(output) / "config.yaml").is_file())
    return PlannedRun(
        study=study.name,
        tier=arguments.budget,
        arm=arm,
        config=config,
        words=(arm.recipe, *words, "--seed", str(seed), "--output", output),
        file=arguments.results / place / f"{name}.json",
    )


def _check_changes(runs: list[PlannedRun]) -> None:
    """Refuse to mix runs of an arm as it is with earlier ones of the arm as it was."""
    changed = [*filter(None, map(changes, runs))]
    if changed:
        lines = "\n  ".join(changed)
        raise ValueError(
            f"{count(len(changed), 'run')} of {len(runs)} began with other settings than their arms have now. Delete "
            f"what is kept of them to run them again, or name the arms anew:\n  {lines}"
        )
