"""The task: predict the last column of a table of numbers from the other columns."""

import csv
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from examples.regression.model import RegressorConfig
from gatewright.data import BatchConfig
from gatewright.settings import settings
from gatewright.tasks import Batch, DataSplit, Evaluation, LayerUse, Table, Task

BOUNDS = (-0.67, 0.0, 0.67)  # quarters of a normal distribution
QUARTERS = ("lowest quarter", "second quarter", "third quarter", "highest quarter")


@settings("data")
class TableConfig(BatchConfig):
    """A table of numbers.

    Args:
        path: A CSV file with a first line of names; None is the table of 442 diabetes patients in scikit-learn.
    """

    path: str | None = None


class Rows(NamedTuple):
    """A part of a table, standardised by the training rows: each row's columns, and the number to predict."""

    columns: Float[Tensor, "rows columns"]
    target: Float[Tensor, " rows"]
    fingerprint: dict[str, Any]

    def __len__(self) -> int:
        """Return the number of rows."""
        return len(self.target)


class Parts(NamedTuple):
    """Seven, one and two tenths of the rows."""

    train: Rows
    holdout: Rows
    test: Rows


@dataclass(frozen=True)
class SquaredError(Evaluation):
    """What a model makes of a part of the table.

    Args:
        error: Sum of the squared errors of the rows of each quarter, where the variance of the training rows is 1.
        num_rows: Number of rows of each quarter.
    """

    error: Float[Tensor, " quarters"]
    num_rows: Int[Tensor, " quarters"]

    @property
    def metrics(self) -> dict[str, float]:
        """The mean squared error."""
        return {"squared_error": float(self.error.sum() / self.num_rows.sum())}

    @property
    def headline(self) -> tuple[str, str]:
        """The share of the variance that is left."""
        return "squared error", f"{self.metrics['squared_error']:.3f} of the variance"

    def tables(self) -> list[Table]:
        """Return the mean squared error of each quarter, for the terminal and the page."""
        means = (self.error / self.num_rows.clamp(min=1)).tolist()
        rows = [
            (name, str(count), f"{mean:.3f}")
            for name, count, mean in zip(QUARTERS, self.num_rows.tolist(), means, strict=True)
        ]
        return [Table("Squared error by quarter of the target", ("quarter", "rows", "squared error"), rows)]


class Regression(Task):
    """Predict a number for each row of a table."""

    item = "row"
    models = (RegressorConfig,)
    data = TableConfig

    def load(self, data: TableConfig, model: RegressorConfig) -> Parts:
        """Shuffle the rows once, divide them, and standardise all of them by the training rows."""
        names, table = read_csv(Path(data.path)) if data.path else diabetes()
        table = table[torch.randperm(len(table), generator=torch.Generator().manual_seed(0))]
        sizes = len(table) * 7 // 10, len(table) // 10
        parts = table.split([*sizes, len(table) - sum(sizes)])
        mean, std = parts[0].mean(0), parts[0].std(0).clamp(min=1e-6)
        fingerprint = {"names": names, "mean": mean.tolist(), "std": std.tolist(), "num_rows": sizes[0]}
        scaled = [(part - mean) / std for part in parts]
        return Parts(*(Rows(part[:, :-1], part[:, -1].contiguous(), fingerprint) for part in scaled))

    def describe_data(self, data: TableConfig, splits: Parts) -> list[DataSplit]:
        """Say where the rows come from, with a hash of each part."""
        source, names = data.path or "embedded in scikit-learn", ("training", "held-out", "test")
        return [
            DataSplit(name="table", source=source, split=name, num_items=len(part), digest=_digest(part))
            for name, part in zip(names, splits, strict=True)
        ]

    def num_batches(self, part: Rows, data: TableConfig) -> int:
        """Count the batches of an epoch, the short last one among them."""
        return -(-len(part) // data.batch_size)

    def training_batches(self, part: Rows, data: TableConfig, *, seed: int, epoch: int, start: int) -> Iterator[Batch]:
        """Iterate over the shuffled rows, in an order that follows from seed and epoch."""
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        return ((part.columns[rows], part.target[rows]) for rows in order.split(data.batch_size)[start:])

    def evaluation_batches(self, part: Rows, batch_size: int) -> Iterator[Batch]:
        """Iterate over the rows in order."""
        return zip(part.columns.split(batch_size), part.target.split(batch_size), strict=True)

    def fingerprint(self, part: Rows) -> dict[str, Any]:
        """Return the columns' names, by what they were standardised, and how many rows there are."""
        return part.fingerprint

    def build(self, model: RegressorConfig, fingerprint: Mapping[str, Any]) -> nn.Module:
        """Make the model for the columns but the last."""
        return model.build(len(fingerprint["names"]) - 1)

    def loss(self, output: Float[Tensor, " rows"], batch: Batch, *, label_smoothing: float = 0.0) -> Float[Tensor, ""]:
        """Add up the squared errors."""
        return (output.float() - batch[1]).square().sum()

    def measure(self, output: Float[Tensor, " rows"], batch: Batch) -> dict[str, Tensor]:
        """Add up the squared errors of each quarter, and count its rows."""
        squares, quarters = (output.double() - batch[1]).square(), self.classes(batch)
        error = torch.zeros(len(QUARTERS), dtype=torch.float64, device=output.device)
        return {
            "error": error.index_add(0, quarters, squares),
            "num_rows": quarters.bincount(minlength=len(QUARTERS)),
        }

    def evaluation(self, part: Rows, sums: Mapping[str, Tensor], layers: Mapping[str, LayerUse]) -> SquaredError:
        """Make the evaluation of a part."""
        return SquaredError(layers, sums["error"], sums["num_rows"])

    def class_names(self, part: Rows) -> tuple[str, ...]:
        """Tell the work of experts apart by the quarter that the target lies in."""
        return QUARTERS

    def classes(self, batch: Batch) -> Int[Tensor, " rows"]:
        """Return the quarter of each row."""
        return torch.bucketize(batch[1], torch.tensor(BOUNDS, device=batch[1].device))

    def predict(self, model: nn.Module, file: Path, fingerprint: Mapping[str, Any], *, top: int) -> dict[str, Any]:
        """Return a number for each row of a CSV file, whose last column may be missing."""
        names, rows = read_csv(file)
        expected = fingerprint["names"]
        if names not in (expected, expected[:-1]):
            raise ValueError(f"{file} has the columns {names}; the model was trained on {expected}.")
        mean, std = torch.tensor(fingerprint["mean"]), torch.tensor(fingerprint["std"])
        columns = (rows[:, : len(expected) - 1] - mean[:-1]) / std[:-1]
        return {expected[-1]: (model(columns) * std[-1] + mean[-1]).tolist()}


def read_csv(path: Path) -> tuple[list[str], Float[Tensor, "rows columns"]]:
    """Read the names and the numbers of a table."""
    with path.open(newline="", encoding="utf-8") as file:
        names, *rows = csv.reader(file)
    return names, torch.tensor([[float(cell) for cell in row] for row in rows])


def diabetes() -> tuple[list[str], Float[Tensor, "rows columns"]]:
    """Return ten measurements of each patient, and how far the disease progressed in a year."""
    from sklearn.datasets import load_diabetes

    found = load_diabetes(scaled=False)
    columns, target = torch.from_numpy(found.data).float(), torch.from_numpy(found.target).float()
    return [*found.feature_names, "progression"], torch.cat([columns, target[:, None]], 1)


def _digest(part: Rows) -> str:
    content = torch.cat([part.columns, part.target[:, None]], 1).contiguous()
    return hashlib.blake2b(content.numpy().data, digest_size=8).hexdigest()
