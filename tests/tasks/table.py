"""A third task in one file: a number for each row of a table, whose rows count with weights, some of them zero."""

from collections import namedtuple
from dataclasses import dataclass

import torch
from torch import nn

from gatewright.data import BatchConfig
from gatewright.models import MixtureConfig
from gatewright.tasks import DataSplit, Evaluation, Task
from gatewright.train import OptimConfig, RunConfig, TrackingConfig

Splits = namedtuple("Splits", "train holdout test")


@dataclass(frozen=True, kw_only=True)
class TableConfig(BatchConfig):
    rows: int = 60


@dataclass(frozen=True, kw_only=True)
class RegressorConfig(MixtureConfig):
    width: int = 8


@dataclass(frozen=True)
class SquaredError(Evaluation):
    error: float

    @property
    def metrics(self):
        return {"squared_error": self.error}

    @property
    def headline(self):
        return "squared error", f"{self.error:.3f}"


class Regression(Task):
    item = "row"
    models = (RegressorConfig,)
    data = TableConfig

    def load(self, data, model):
        generator = torch.Generator().manual_seed(3)
        table = torch.randn(data.rows + 20, 4, generator=generator)
        return Splits(table[: data.rows], table[data.rows : -10], table[-10:])

    def describe_data(self, data, splits):
        parts = zip(("training", "held-out", "test"), splits, strict=True)
        source = "random numbers"
        return [
            DataSplit(name="table", source=source, split=name, num_items=len(part), digest="0") for name, part in parts
        ]

    def num_batches(self, part, data):
        return len(part) // data.batch_size

    def training_batches(self, part, data, *, seed, epoch, start):
        order = torch.randperm(len(part), generator=torch.Generator().manual_seed(seed + epoch))
        batches = order.split(data.batch_size)[: self.num_batches(part, data)]
        return (self._batch(part[rows]) for rows in batches[start:])

    def evaluation_batches(self, part, batch_size):
        return (self._batch(rows) for rows in part.split(batch_size))

    def _batch(self, rows):
        """Features, the number to find, and how much a row counts: all padding of a text would count nothing."""
        return rows[:, :3], rows[:, 0] * rows[:, 1], (rows[:, 3] > -0.5).long()

    def fingerprint(self, part):
        return {"num_rows": len(part), "columns": 3}

    def build(self, model, fingerprint):
        first = nn.Linear(fingerprint["columns"], model.width)
        mixture = model.build_mixture(
            lambda: nn.Linear(model.width, model.width), router_dim=model.width, item_shape=(model.width,)
        )
        return nn.Sequential(first, nn.ReLU(), mixture, nn.ReLU(), nn.Linear(model.width, 1), nn.Flatten(0))

    def count(self, batch):
        return int(batch[2].sum())

    def loss(self, output, batch, *, label_smoothing=0.0):
        return ((output - batch[1]).square() * batch[2]).sum()

    def measure(self, output, batch):
        return {"error": self.loss(output, batch).double(), "count": batch[2].sum()}

    def evaluation(self, part, sums, layers):
        return SquaredError(layers, float(sums["error"] / sums["count"]))


def regression(output, *, model=None, data=None, **changes):
    return RunConfig(
        recipe="regression",
        task="regression",
        model=RegressorConfig(num_experts=4, top_k=2, **model or {}),
        data=TableConfig(batch_size=20, eval_batch_size=7, **data or {}),
        optim=OptimConfig(name="sgd", lr=0.1),
        tracking=TrackingConfig(enabled=False, log_interval=1),
        **{"device": "cpu", "epochs": 2, "output": str(output)} | changes,
    )
