"""Steps of recipes and of their dense twins, as the training loop makes them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import cycle, islice

import torch

from benchmarks.arms import go_by
from gatewright.data import ImageSet, ImageSplits
from gatewright.recipes import RECIPES
from gatewright.tasks import Splits, task_named
from gatewright.train import RunConfig
from gatewright.train.build import build_engine

Step = Callable[[], object]


def data_of(config: RunConfig) -> Splits:
    """Return the recipe's data, or random images in their place."""
    if config.task != "classification":
        return task_named(config.task).load(config.data, config.model)
    images = torch.randint(0, 256, (4 * config.data.batch_size, 3, 32, 32), dtype=torch.uint8)
    part = ImageSet(images, torch.arange(len(images)) % 10, tuple(map(str, range(10))))
    return ImageSplits(part, part, part)


def recipe_step(config: RunConfig, splits: Splits, way: str | None) -> Step:
    """Return a step of a run's engine, which goes through some batches again and again."""
    torch.manual_seed(0)
    engine = build_engine(config, splits, torch.device("cpu"))
    if way:
        go_by(engine.model, way)
    task = task_named(config.task)
    batches = cycle(list(islice(task.training_batches(splits.train, config.data, seed=0, epoch=0, start=0), 4)))
    return lambda: engine.step([next(batches)])


def recipe_steps(name: str) -> dict[str, Callable[[], Step]]:
    """Return what makes the steps of a recipe and of its dense twin, in both precisions."""
    mixture, twin = RECIPES[name](), RECIPES[f"{name}-dense"]()
    splits = data_of(mixture)
    ways: dict[str, tuple[RunConfig, str | None]] = {"dense": (twin, None), "mixture": (mixture, None)}
    if name == "python-lm":
        ways |= {"mixture, torch": (mixture, "torch"), "mixture, rows": (mixture, "rows")}
    return {
        f"{arm}, {precision}": partial(recipe_step, replace(config, precision=precision), splits, way)
        for precision in ("float32", "bfloat16")
        for arm, (config, way) in ways.items()
    }
