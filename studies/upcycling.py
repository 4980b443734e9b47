"""What upcycling does to a network under training: accuracy before, right after, and an epoch later.

    python -m studies.upcycling FOLDER_OF_PARQUET_FILES

The dense twin of the recipe cifar10-cnn trains until the recipe's `upcycle_epoch`. Then two networks go on from there
on the recipe's schedule: the mixture of its copies for one epoch, and the dense network for as many operations.
Accuracy is that on 10,000 held-out images. The figures go to studies/results/upcycling/cifar10-cnn.json.
"""

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gatewright.recipes import RECIPES
from gatewright.tasks import Splits, Task, task_named
from gatewright.train import RunConfig
from gatewright.train.build import build_engine, upcycle_engine
from gatewright.train.evaluate import evaluate
from gatewright.train.result import active_flops, hardware, versions, write_json
from gatewright.train.step import TorchEngine

RESULTS = Path(__file__).parent / "results" / "upcycling" / "cifar10-cnn.json"


def train(engine: TorchEngine, task: Task, splits: Splits, epoch: int, steps: int) -> None:
    """Make optimizer steps from the beginning of an epoch on, into the one after it where they are more."""
    config = engine.config
    for place in range(steps):
        if place % engine.steps_per_epoch == 0:
            batches = task.training_batches(splits.train, config.data, seed=config.seed, epoch=epoch, start=0)
            epoch += 1
        engine.step([next(batches)])


def accuracy(engine: TorchEngine, task: Task, splits: Splits) -> float:
    """Return the share of held-out images that are classified right."""
    found: float = evaluate(task, engine.evaluated, splits.holdout, batch_size=1000).metrics["accuracy"]
    return found


def run(config: RunConfig) -> dict[str, Any]:
    """Train one network and go on with it in both ways."""
    task, cpu = task_named(config.task), torch.device("cpu")
    splits = task.load(config.data, config.model)
    torch.manual_seed(config.seed)
    dense = build_engine(config, splits, cpu, dense=True)
    split = config.model.upcycle_epoch
    for epoch in range(split):
        train(dense, task, splits, epoch, dense.steps_per_epoch)
    found = {"seed": config.seed, "before": accuracy(dense, task, splits)}
    state = dense.state_dict()
    mixture = upcycle_engine(dense, config, splits)
    found["right_after"] = accuracy(mixture, task, splits)
    dense = build_engine(config, splits, cpu, dense=True)
    dense.load_state_dict(state)
    example = next(task.evaluation_batches(splits.holdout, 256))[0]
    ratio = active_flops(mixture.evaluated, example) / active_flops(dense.evaluated, example)
    train(mixture, task, splits, split, mixture.steps_per_epoch)
    train(dense, task, splits, split, round(ratio * dense.steps_per_epoch))
    later = {"mixture_later": accuracy(mixture, task, splits), "dense_later": accuracy(dense, task, splits)}
    return {**found, **later, "operations_of_a_mixtures_step_over_the_denses": ratio}


def main() -> None:
    """Run three seeds."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="folder of parquet files")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    asked = parser.parse_args()
    recipe = RECIPES["cifar10-cnn"]()
    recipe = replace(recipe, data=replace(recipe.data, path=asked.data, holdout=0.2))
    runs = []
    for seed in asked.seeds:
        runs.append(run(replace(recipe, seed=seed)))
        print(json.dumps(runs[-1]), flush=True)
    write_json({"runs": runs, "versions": versions(), "hardware": hardware(torch.device("cpu"))}, RESULTS)


if __name__ == "__main__":
    main()
