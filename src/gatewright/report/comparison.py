"""Two groups of runs side by side, such as a mixture and its dense twin: at equal operations and at equal time."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import mean, stdev
from typing import Any, Self

from gatewright.extras import require
from gatewright.report.curves import Curves, read_metrics
from gatewright.report.facts import count, item_of

SECONDS, OPERATIONS = "seconds", "operations"
# Settings that do not tell two groups of runs apart.
UNSAID = ("seed", "output", "data.path")


@dataclass(frozen=True)
class MeasuredRun:
    """A finished run: the content of its ``result.json`` and its ``metrics.jsonl``, or what a study keeps of both."""

    folder: Path
    result: dict[str, Any]
    curves: Curves

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read a run's folder, or the file of a run that a study keeps.

        Raises:
            FileNotFoundError: If the run has not finished.
            ValueError: If it has no held-out part, or was made before runs kept what a comparison needs.
        """
        file = folder if folder.is_file() else folder / "result.json"
        if not file.is_file():
            raise FileNotFoundError(f"{folder} has no result.json, which a run writes when it ends. Finish it first.")
        result = json.loads(file.read_text(encoding="utf-8"))
        run = cls(folder, result, _kept_curves(result) or read_metrics(folder / "metrics.jsonl"))
        if "items_per_step" not in result or not run.curves.get("holdout/train_seconds"):
            raise ValueError(
                f"{folder} does not say how good it was after which time: it has no held-out part, or an earlier "
                "version made it. Train it again with a held-out part (--data.holdout 0.05)."
            )
        return run

    def kept(self) -> dict[str, Any]:
        """Return what a comparison needs of a run, as JSON: its result, and the curves that are compared."""
        names = (f"holdout/{self._metric}", "holdout/train_seconds", f"test/{self._metric}")
        return self.result | {"curves": {name: self.curves[name] for name in names}}

    @property
    def name(self) -> str:
        """The recipe, with what the run changes of it."""
        changes = self.result.get("changes") or {}
        said = [f"{key}={change['run']}" for key, change in changes.items() if key not in UNSAID]
        return " ".join([self.result["recipe"], *said])

    @property
    def figure(self) -> str:
        """The name of the figure that the run is judged by, such as ``"bits per byte"``."""
        return str(self.result["test_headline"][0])

    @property
    def test(self) -> float:
        """That figure on the test set."""
        return next(iter(self.curves[f"test/{self._metric}"].values()))

    @property
    def sign(self) -> int:
        """1 where a higher figure is better, else -1."""
        return 1 if self.result["higher_is_better"] else -1

    @cached_property
    def held_out(self) -> list[float]:
        """The figure on the held-out part at every evaluation."""
        return [value for _, value in sorted(self.curves[f"holdout/{self._metric}"].items())]

    @property
    def operations_per_item(self) -> int:
        """Additions and multiplications of one item's forward in the trained model."""
        return int(self.result[f"active_flops_per_{item_of(self.result)}"])

    def axis(self, name: str) -> list[float]:
        """Return the seconds or the operations of training until each evaluation, those of evaluations included.

        Operations are three times those of a forward, since backward takes two times as many.
        """
        steps = sorted(self.curves["holdout/train_seconds"].items())
        if name == SECONDS:
            return [seconds for _, seconds in steps]
        per_step = 3 * self.operations_per_item * self.result["items_per_step"]
        return [float(step * per_step) for step, _ in steps]

    def held_out_at(self, place: float, axis: str) -> float:
        """Return the held-out figure at a place of an axis: between evaluations on a line, after the last the last."""
        return float(require("numpy", "train").interp(place, self.axis(axis), self.held_out))

    def place_of(self, target: float, axis: str) -> float:
        """Return where on an axis the held-out figure is first as good as a target; infinity where it never is."""
        before: tuple[float, float] | None = None
        for place, value in zip(self.axis(axis), self.held_out, strict=True):
            if self.sign * value >= self.sign * target:
                if before is None:
                    return place
                share = (target - before[1]) / (value - before[1])
                return before[0] + share * (place - before[0])
            before = place, value
        return math.inf

    @property
    def _metric(self) -> str:
        return self.figure.replace(" ", "_")


@dataclass(frozen=True)
class Row:
    """One line of a comparison.

    Args:
        name: Name of what is compared.
        values: One value per run.
        others: One value per run of the other group, in the order of the same seeds.
        relative: Whether the difference is a ratio.
    """

    name: str
    values: Sequence[float]
    others: Sequence[float]
    relative: bool = False

    @property
    def difference(self) -> str:
        """The mean of the differences of equal seeds, or of the ratios, with their standard deviation."""
        pairs = zip(self.values, self.others, strict=True)
        if self.relative:
            return f"{spread([one / other for one, other in pairs])} times"
        return spread([one - other for one, other in pairs], signed=True)

    @property
    def p_text(self) -> str:
        """The p-value of `p_value` in words."""
        return "" if self.p_value is None else "<0.001" if self.p_value < 0.001 else f"{self.p_value:.3f}"

    @property
    def p_value(self) -> float | None:
        """The two-sided p-value of a t-test on pairs of equal seeds; None with fewer than two pairs or no spread."""
        differences = [one - other for one, other in zip(self.values, self.others, strict=True)]
        if len(differences) < 2 or not all(map(math.isfinite, differences)) or stdev(differences) == 0:
            return None
        return float(require("scipy.stats", "train").ttest_1samp(differences, 0).pvalue)


@dataclass(frozen=True)
class Comparison:
    """Runs beside others of the same seeds.

    Args:
        runs: The runs in question.
        others: Runs to compare them with, one of the same seed for each.
    """

    runs: Sequence[MeasuredRun]
    others: Sequence[MeasuredRun]

    @classmethod
    def read(cls, runs: Sequence[Path], others: Sequence[Path]) -> Self:
        """Read two groups of runs' folders.

        Raises:
            FileNotFoundError: If a run has not finished.
            ValueError: If the groups have other seeds, other figures or other data, or a seed occurs twice.
        """
        return cls.of([*map(MeasuredRun.read, runs)], [*map(MeasuredRun.read, others)])

    @classmethod
    def of(cls, runs: Sequence[MeasuredRun], others: Sequence[MeasuredRun]) -> Self:
        """Pair runs with others by their seeds, as `read` does."""
        groups = [sorted(each, key=lambda run: int(run.result["seed"])) for each in (runs, others)]
        seeds = [[run.result["seed"] for run in group] for group in groups]
        if seeds[0] != seeds[1] or len(set(seeds[0])) < len(seeds[0]):
            raise ValueError(
                f"Runs are compared by pairs of one seed; got the seeds {seeds[0]} and {seeds[1]}. Name a run of "
                "each seed on both sides."
            )
        every = [run for group in groups for run in group]
        for what, found in (("figure", {run.figure for run in every}), ("data", {_data(run) for run in every})):
            if len(found) > 1:
                raise ValueError(f"Runs that are compared have the same {what}; got {' and '.join(sorted(found))}.")
        return cls(*groups)

    @property
    def title(self) -> str:
        """The number of pairs."""
        return f"{count(len(self.runs), 'pair')} of runs"

    @property
    def figure(self) -> str:
        """The name of the figure that the runs are judged by."""
        return self.runs[0].figure

    def rows(self) -> list[Row]:
        """Return every line: the test figure, the held-out one at equal operations and time, and what they cost."""
        figure, item = self.figure, item_of(self.runs[0].result)
        return [
            Row(f"test {figure}", *self._both(lambda run: run.test)),
            Row("held out, at the end", *self._both(lambda run: run.held_out[-1])),
            self._at_the_end_of_the_other(OPERATIONS),
            self._at_the_end_of_the_other(SECONDS),
            self._until_as_good_as_the_other(OPERATIONS),
            self._until_as_good_as_the_other(SECONDS),
            Row("training seconds", *self._both(lambda run: run.axis(SECONDS)[-1]), relative=True),
            Row(f"operations per {item}", *self._both(lambda run: run.operations_per_item), relative=True),
            Row("parameters", *self._both(lambda run: run.result["num_parameters"]), relative=True),
        ]

    def notes(self) -> list[str]:
        """Say what makes the comparison of seconds doubtful, if anything does."""
        found = sorted({_hardware(run.result["hardware"]) for run in (*self.runs, *self.others)})
        if len(found) == 1:
            return []
        return [f"The seconds cannot be compared, since the runs had different hardware: {'; '.join(found)}."]

    def _both(self, value: Callable[[MeasuredRun], float]) -> tuple[list[float], list[float]]:
        return [value(run) for run in self.runs], [value(run) for run in self.others]

    def _at_the_end_of_the_other(self, axis: str) -> Row:
        pairs = list(zip(self.runs, self.others, strict=True))
        values = [run.held_out_at(other.axis(axis)[-1], axis) for run, other in pairs]
        return Row(f"held out, at equal {axis}", values, [other.held_out[-1] for _, other in pairs])

    def _until_as_good_as_the_other(self, axis: str) -> Row:
        pairs = list(zip(self.runs, self.others, strict=True))
        values = [run.place_of(other.held_out[-1], axis) for run, other in pairs]
        ends = [other.axis(axis)[-1] for _, other in pairs]
        return Row(f"{axis} to equal quality", values, ends, relative=True)


def spread(values: Sequence[float], *, signed: bool = False) -> str:
    """Write the mean of some values with their standard deviation, or that there is none."""
    if not all(map(math.isfinite, values)):
        return f"reached by {sum(map(math.isfinite, values))} of {len(values)}"
    deviation = f" ± {stdev(values):.2g}" if len(values) > 1 else ""
    return f"{mean(values):{'+' if signed else ''},.4g}{deviation}"


def _kept_curves(result: dict[str, Any]) -> Curves:
    """Return the curves in a file that a study keeps, whose steps JSON has made words; empty for a run's own result."""
    curves = result.get("curves", {})
    return {name: {int(step): value for step, value in curve.items()} for name, curve in curves.items()}


def _hardware(found: dict[str, Any]) -> str:
    processor = found.get("accelerator") or found["processor"]
    return f"{processor}, {count(found.get('threads', 1), 'thread')}"


def _data(run: MeasuredRun) -> str:
    parts = (part for part in run.result["data"] if part["split"] != "training")
    return ", ".join(f"{part['name']} {part['split']} {part['digest']}" for part in parts)
