"""Time training steps of the recipe python-lm and of its dense twin on a CPU: ``python -m benchmarks.python_lm``.

Both train in float32 and in bfloat16, and the mixture's experts both go the fused way and by rows.
"""

import statistics
import time
from dataclasses import replace
from itertools import islice

import torch

from gatewright import moe_layers
from gatewright.recipes import RECIPES
from gatewright.tasks import Splits, task_named
from gatewright.train import RunConfig
from gatewright.train.build import build_engine
from gatewright.train.step import TorchEngine

ROUNDS = 5


def engine_of(config: RunConfig, splits: Splits, way: str | None) -> TorchEngine:
    """Make the engine of a run, whose experts go by rows or by the back-end torch if that is said."""
    torch.manual_seed(0)
    engine = build_engine(config, splits, torch.device("cpu"))
    for _, layer in moe_layers(engine.model):
        if way == "rows":
            layer.experts.register_forward_hook(lambda *_: None)
        elif way == "fused":
            layer.experts.backend = "torch"
    return engine


def main() -> None:
    """Time all arms in turn, and print medians."""
    mixture, dense = RECIPES["python-lm"](), RECIPES["python-lm-dense"]()
    task = task_named(mixture.task)
    splits = task.load(mixture.data, mixture.model)
    ways = {"dense": (dense, None), "mixture, fused": (mixture, "fused"), "mixture, rows": (mixture, "rows")}
    arms = {
        f"{name}, {precision}": engine_of(replace(config, precision=precision), splits, way)
        for name, (config, way) in ways.items()
        for precision in ("float32", "bfloat16")
    }
    batches = list(islice(task.training_batches(splits.train, mixture.data, seed=0, epoch=0, start=0), ROUNDS + 1))
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for batch in batches:  # The first warms up.
        for name, engine in arms.items():
            start = time.perf_counter()
            engine.step([batch])
            seconds[name].append(time.perf_counter() - start)
    for name, (_, *each) in seconds.items():
        print(f"{name}: {statistics.median(each):.2f} s per step ({min(each):.2f} to {max(each):.2f})")


if __name__ == "__main__":
    main()
