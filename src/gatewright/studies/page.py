"""The page of a study: its question, tables, pictures, and where the figures come from, from the kept runs alone."""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from gatewright.report import Comparison, MeasuredRun, plot_groups
from gatewright.report.comparison import OPERATIONS, SECONDS, Row, spread
from gatewright.report.facts import count, duration, item_of
from gatewright.studies.study import Study

Table = list[tuple[str, ...]]
ANSWER = "**Answer.**"


@dataclass(frozen=True)
class TierResults:
    """The kept runs of a study in one tier.

    Args:
        study: The study.
        tier: Name of the tier.
        runs: The runs of each arm, by its name.
    """

    study: Study
    tier: str
    runs: Mapping[str, Sequence[MeasuredRun]]

    @classmethod
    def read(cls, study: Study, tier: str, folder: Path) -> "TierResults":
        """Read the files of a tier's runs, of the arms that the study has."""
        found = defaultdict(list)
        for run in map(MeasuredRun.read, sorted(folder.glob("*.json"))):
            found[run.result["study"]["arm"]].append(run)
        return cls(study, tier, {arm.name: found[arm.name] for arm in study.arms if arm.name in found})

    @property
    def every(self) -> list[MeasuredRun]:
        """All runs."""
        return [run for runs in self.runs.values() for run in runs]

    @property
    def alone(self) -> bool:
        """Whether each ran with no other run of the study beside it, so that seconds can be compared."""
        return all(run.result["study"]["jobs"] == 1 for run in self.every)

    def groups(self) -> Iterator[tuple[str, dict[str, Sequence[MeasuredRun]]]]:
        """Yield the arms that are compared with each other, by the twin that they are compared with."""
        twins = {arm.name: self.study.twin_of(arm) for arm in self.study.arms}
        for twin in dict.fromkeys(twins[name] for name in self.runs):
            yield twin, {name: runs for name, runs in self.runs.items() if twins[name] == twin}

    def rows(self, name: str, twin: str) -> dict[str, Row]:
        """Compare an arm with its twin by the seeds that both have; nothing for the twin itself, or without such."""
        pairs = [self.runs[each] for each in (name, twin) if each in self.runs]
        common = set.intersection(*({run.result["seed"] for run in runs} for runs in pairs))
        if name == twin or len(pairs) < 2 or not common:
            return {}
        both = [[run for run in runs if run.result["seed"] in common] for runs in pairs]
        return {row.name: row for row in Comparison.of(*both).rows()}


def write_page(study: Study, results: Path, pages: Path) -> Path:
    """Write the page of a study with its pictures, and the index of all pages beside it.

    Raises:
        FileNotFoundError: If no run of the study is kept.
    """
    tiers = [TierResults.read(study, tier, results / study.name / tier) for tier in study.tiers]
    tiers = [tier for tier in tiers if tier.runs]
    if not tiers:
        raise FileNotFoundError(f"No run of {study.name} is kept in {results}. Run: gatewright study {study.name}.")
    pages.mkdir(parents=True, exist_ok=True)
    parts = [f"# {study.name}", study.question]
    parts += [f"{ANSWER} {study.answer}"] if study.answer else []
    parts += [part for tier in tiers for part in _section(tier, pages)]
    path = pages / f"{study.name}.md"
    path.write_text("\n\n".join(parts) + "\n", encoding="utf-8")
    _write_index(pages)
    return path


def _write_index(pages: Path) -> None:
    """Link every page, with what it asks and the first paragraph of its answer."""
    parts = ["# What the studies found"]
    for page in sorted(pages.glob("*.md")):
        if page.name != "README.md":
            title, question, after, *_ = page.read_text(encoding="utf-8").split("\n\n")
            parts += [f"## [{title.removeprefix('# ')}]({page.name})", question]
            parts += [after] if after.startswith(ANSWER) else []
    (pages / "README.md").write_text("\n\n".join(parts) + "\n", encoding="utf-8")


def _section(results: TierResults, pages: Path) -> Iterator[str]:
    study = results.study
    yield f"## {results.tier}: {study.tiers[results.tier].about}"
    for twin, runs in results.groups():
        yield markdown(quality_table(results, twin, runs))
        yield markdown(cost_table(results, runs))
        only = [name for name, _ in results.groups()] == [twin]
        file = "-".join([study.name, results.tier, *([] if only else [twin])]) + ".png"
        axes = (SECONDS, OPERATIONS) if results.alone else (OPERATIONS,)
        plot_groups(runs, pages / file, axes=axes)
        yield f"![Held-out figure of every arm over {' and '.join(axes)} of training]({file})"
    yield from origin(results)


def quality_table(results: TierResults, twin: str, runs: Mapping[str, Sequence[MeasuredRun]]) -> Table:
    """Return how good each arm is, and how it stands to its twin: by pairs of seeds, and by a t-test on them."""
    first = next(iter(runs.values()))[0]
    about = {arm.name: arm.about for arm in results.study.arms}
    against = f"to {twin}"
    heading = ["arm", "what it is", f"test {first.figure}", "n", against, "p", f"{against}, at equal operations"]
    heading += ["operations to its quality"]
    heading += [f"{against}, at equal seconds", "seconds to its quality"] if results.alone else []
    table = [tuple(heading)]
    for name, group in runs.items():
        rows = results.rows(name, twin)
        cells = [f"`{name}`", about[name], spread([run.test for run in group]), str(len(group))]
        compared = [f"test {first.figure}", "", f"held out, at equal {OPERATIONS}", f"{OPERATIONS} to equal quality"]
        compared += [f"held out, at equal {SECONDS}", f"{SECONDS} to equal quality"] if results.alone else []
        cells += [_difference(rows, each, first) if each else _p(rows, compared[0]) for each in compared]
        table.append(tuple(cells))
    return table


def _p(rows: Mapping[str, Row], name: str) -> str:
    return rows[name].p_text if rows else ""


def _difference(rows: Mapping[str, Row], name: str, run: MeasuredRun) -> str:
    """Write a difference; where less is better also as a share of the twin's."""
    if not rows:
        return ""
    row = rows[name]
    if row.relative or run.sign > 0:
        return row.difference
    share = mean(one / other for one, other in zip(row.values, row.others, strict=True)) - 1
    return f"{row.difference} ({100 * share:+.2f} %)"


def cost_table(results: TierResults, runs: Mapping[str, Sequence[MeasuredRun]]) -> Table:
    """Return what each arm costs, and how it uses its experts on the test set: means over seeds, layer by layer."""
    item = item_of(next(iter(runs.values()))[0].result)
    heading = ["arm", f"operations per {item}", "parameters", "busiest over mean load, by layer", "load CV, by layer"]
    heading += ["dropped", "dead experts"] + (["seconds per step", "seconds of training"] if results.alone else [])
    table = [tuple(heading)]
    for name, group in runs.items():
        content = [run.result for run in group]
        cells = [f"`{name}`", f"{group[0].operations_per_item:,}", f"{content[0]['num_parameters']:,}"]
        cells += [_by_layer(content, "max_over_mean_load"), _by_layer(content, "load_cv")]
        layers = [layer for each in content for layer in each["layers"].values()]
        cells += [f"{mean(layer['dropped_fraction'] for layer in layers):.1%}" if layers else ""]
        cells += [", ".join(str(_dead(each)) for each in content) if layers else ""]
        if results.alone:
            steps = [each["processes"][0]["step_seconds"] for each in content]
            cells += [spread(steps), spread([run.axis(SECONDS)[-1] for run in group])]
        table.append(tuple(cells))
    return table


def _dead(result: Mapping[str, Any]) -> int:
    return sum(len(layer["dead_experts"]) for layer in result["layers"].values())


def _by_layer(results: Sequence[Mapping[str, Any]], figure: str) -> str:
    """Return a figure of every layer, each the mean over seeds."""
    by_layer = zip(*([layer[figure] for layer in each["layers"].values()] for each in results), strict=True)
    return ", ".join(f"{mean(values):.2f}" for values in by_layer)


def origin(results: TierResults) -> Iterator[str]:
    """Say what the figures of a tier come from: hardware, versions, seeds, seconds, commit and commands."""
    every = [run.result for run in results.every]
    hardware = sorted({_hardware(each["hardware"]) for each in every})
    versions = sorted({f"torch {each['versions']['torch']}, Python {each['versions']['python']}" for each in every})
    commits = sorted({each["commit"] for each in every if each.get("commit")})
    seeds = sorted({each["seed"] for each in every})
    at_once = max(each["study"]["jobs"] for each in every)
    said = [
        f"{count(len(every), 'run')} with the seeds {', '.join(map(str, seeds))}, on {'; '.join(hardware)}",
        f"with {'; '.join(versions)}",
        f"{duration(sum(each['train_seconds'] for each in every))} of training in all",
        f"up to {count(at_once, 'run')} at once" + ("" if at_once == 1 else ", so seconds are not compared"),
        *([f"commit {', '.join(commits)}"] if commits else []),
    ]
    yield (
        f"Made by `gatewright study {results.study.name} --budget {results.tier}`: {'; '.join(said)}. Test figures are "
        "means with standard deviations over seeds, and differences those of pairs of equal seeds, with the p-value of "
        "a paired t-test. Held-out figures are those after each epoch ([what the columns mean](../compare.md))."
    )
    commands = [(f"`{name}`", f"`{runs[0].result['command']}`") for name, runs in results.runs.items()]
    yield markdown([("arm", "the command of its first run"), *commands])


def _hardware(found: Mapping[str, Any]) -> str:
    accelerator = f"{found['accelerator']} beside " if "accelerator" in found else ""
    return f"{accelerator}{count(found['cores'], 'core')} of {found['processor']}, {count(found['threads'], 'thread')}"


def markdown(table: Sequence[Sequence[str]]) -> str:
    """Write a table whose first row is the heading."""
    heading, *rows = (f"| {' | '.join(row)} |" for row in table)
    return "\n".join([heading, "|" + " --- |" * len(table[0]), *rows])
