"""The example of docs/tasks.md, whose rows count with weights here, some of them zero as the padding of a text does."""

from dataclasses import replace

from examples.regression.recipe import regression
from examples.regression.task import Regression


class Weighted(Regression):
    def weights(self, batch):
        return (batch[1] > -0.5).long()

    def count(self, batch):
        return int(self.weights(batch).sum())

    def loss(self, output, batch, *, label_smoothing=0.0):
        return ((output - batch[1]).square() * self.weights(batch)).sum()


def weighted(output="unused", **changes):
    config = regression()
    tracking = replace(config.tracking, enabled=False, log_interval=1)
    optim = replace(config.optim, name="sgd", lr=0.1)
    defaults = {"task": "tests.tasks.table:Weighted", "epochs": 2, "device": "cpu"}
    return replace(config, tracking=tracking, optim=optim, **defaults | {"output": str(output)} | changes)
