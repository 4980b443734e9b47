"""A finished run with other experts: an operation on its model and its optimizers, kept as a run of its own."""

import copy
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gatewright.layers.base import moe_layers
from gatewright.surgery import expert_scores
from gatewright.tasks import Splits, Task
from gatewright.train.build import steps_per_epoch
from gatewright.train.checkpoint.format import save_checkpoint
from gatewright.train.checkpoint.restore import Trained, load_run
from gatewright.train.config import DeepSpeedConfig, ParallelConfig, RunConfig
from gatewright.train.config_file import save_config, settings_of
from gatewright.train.device import find_device
from gatewright.train.evaluate import evaluate
from gatewright.train.folder import CONFIG, check_output, newest_intact, own_folder, resume_command
from gatewright.train.operations import Operation, Score
from gatewright.train.optim import named_state
from gatewright.train.result import num_parameters
from gatewright.train.state import load_weights, logical_state
from gatewright.train.step import TorchEngine


@dataclass(frozen=True)
class Change:
    """What an operation did to a run.

    Args:
        config: The settings of the new run, whose folder is its `output`.
        said: What became of the experts, by the layer's name.
        figures: The quality before and right after, by what it was measured on, such as ``"held-out accuracy"``.
        parameters: Number of parameters before and after.
        seconds: Time of the operation, with the measurement of the experts.
    """

    config: RunConfig
    said: Mapping[str, str]
    figures: Mapping[str, tuple[str, str]]
    parameters: tuple[int, int]
    seconds: float


def change_run(
    run: Path, operation: Operation, output: Path, *, data: Any = None, batches: int = 8, test: bool = False
) -> Change:
    """Change the experts of a finished run, and write what comes of it as a run of its own, which can go on.

    Where the run keeps averaged weights, which are those that it is evaluated by, the new run goes on from them. The
    optimizer goes on with what it has of the experts that are kept or copied, and of all other parameters.

    Args:
        run: The run's folder, which stays as it is.
        operation: The change.
        output: The folder of the new run.
        data: Settings of the data, where they are not where they were in training.
        batches: Number of batches of training data that experts are measured on.
        test: Whether to measure the quality on the test set too, beside the held-out part.

    Raises:
        FileExistsError: If the new folder holds a run already, or is a file.
        FileNotFoundError: If there is no run, or its data are not there.
        ValueError: If the run is not finished, has nothing to be measured on, or is not one that the operation can
            change. Nothing is written then.
    """
    _check_folders(run, output)
    trained = load_run(run)
    saved = _finished(run, trained.config)
    data = data or trained.config.data
    config = replace(trained.config, model=operation.network(trained.config.model), data=data, output=str(output))
    _rehearse(operation, trained, config)
    trained.task.check_data(data)
    with torch.random.fork_rng():
        splits = trained.task.load(data, trained.config.model)
        trained.task.check(trained.task.fingerprint(splits.train), trained.fingerprint)
        parts = _parts(trained.task, splits, test=test)
        engine = _engine(trained.config, trained.model, splits)
        engine.load_state_dict(saved["engine"])
        load_weights(engine.model, {name: each.clone() for name, each in engine.evaluated.state_dict().items()})
        before, parameters = _figures(engine, parts), num_parameters(engine.model)
        names = [name for name, _ in engine.model.named_parameters()]
        began = time.monotonic()
        said = _apply(operation, engine, splits, batches)
        seconds = time.monotonic() - began
        changed = _engine(config, _rebuilt(config, engine.model, trained), splits)
        _carry(engine, names, changed, saved["engine"])
        after = _figures(changed, parts)
        figures = {name: (before[name], after[name]) for name in parts}
        change = Change(config, said, figures, (parameters, num_parameters(changed.model)), seconds)
        _save(change, operation, run, saved, logical_state(changed), output)
    return change


def _check_folders(run: Path, output: Path) -> None:
    if run.is_file():
        raise ValueError(f"A run's folder is changed, and {run} is a file, which has no optimizer. Name the folder.")
    if (output / CONFIG).is_file():
        raise FileExistsError(f"{output} holds a run already, and a changed run has a folder of its own. Name another.")


def _finished(run: Path, config: RunConfig) -> dict[str, Any]:
    """Return the state of a run, which has made all its epochs."""
    state, _ = newest_intact(run)
    assert state is not None
    epoch = state["position"]["epoch"]
    if epoch < config.epochs:
        raise ValueError(
            f"A finished run is changed, and {run} has made {epoch} of its {config.epochs} epochs. Go on with: "
            f"{resume_command(config, run)}"
        )
    return state


def _rehearse(operation: Operation, trained: Trained, config: RunConfig) -> None:
    """Change a copy of the model, with equal scores, so that what cannot be is refused before data are read."""
    check_output(config, resume=False)
    model = copy.deepcopy(trained.model)
    scores = {name: torch.ones(layer.router.num_experts) for name, layer in moe_layers(model)}
    operation.apply(model, lambda by: scores, ())
    _rebuilt(config, model, trained)


def _parts(task: Task, splits: Splits, *, test: bool) -> dict[str, Any]:
    """Return what the quality is measured on, by name."""
    parts = {"held-out": splits.holdout} if len(splits.holdout) else {}
    parts |= {"test": splits.test} if test else {}
    if not parts:
        raise ValueError(
            f"The quality is measured before and after on held-out {task.item}s, and this run has none. Measure it on "
            "the test set by `test=True`."
        )
    return parts


def _engine(config: RunConfig, model: nn.Module, splits: Splits) -> TorchEngine:
    """Make the engine of one process that holds a run's state."""
    config = replace(config, engine="torch", deepspeed=DeepSpeedConfig(), compile=False, cuda_graphs=False)
    config = replace(config, processes=1, parallel=ParallelConfig())
    steps = steps_per_epoch(config, splits.train)
    return TorchEngine(model, config, device=find_device(config.device), steps_per_epoch=steps)


def _figures(engine: TorchEngine, parts: Mapping[str, Any]) -> dict[str, str]:
    batch_size, precision = engine.config.data.eval_batch_size, engine.config.precision
    found = {
        name: evaluate(engine.task, engine.model, part, batch_size=batch_size, precision=precision)
        for name, part in parts.items()
    }
    return {name: " ".join(evaluation.headline) for name, evaluation in found.items()}


def _apply(operation: Operation, engine: TorchEngine, splits: Splits, batches: int) -> dict[str, str]:
    """Change the engine's model and its optimizers, with the experts measured on training data if need be."""

    def measure(by: Score) -> dict[str, Tensor]:
        seen = islice(engine.task.evaluation_batches(splits.train, engine.config.data.eval_batch_size), batches)
        return expert_scores(engine.model, (batch[0].to(engine.device) for batch in seen), by)

    return operation.apply(engine.model, measure, engine.optimizers)


def _rebuilt(config: RunConfig, changed: nn.Module, trained: Trained) -> nn.Module:
    """Build the model that the new settings describe, whose tensors are those of the changed one in the same order."""
    model = trained.task.build(config.model, trained.fingerprint)
    load_weights(model, dict(zip(model.state_dict(), changed.state_dict().values(), strict=True)))
    return model


def _carry(engine: TorchEngine, names: Collection[str], changed: TorchEngine, saved: Mapping[str, Any]) -> None:
    """Have the changed run's engine go on from the state of the one before, whose parameters had these names."""
    weights = changed.model.state_dict()
    kept = {name for name, _ in changed.model.named_parameters() if name in names}
    named = [named_state(optimizer, engine.model) for optimizer in engine.optimizers]
    optimizers = [
        {key: value for key, value in state.items() if key.rsplit("|", 1)[0] in kept}
        for state in named[: len(changed.optimizers)]
    ]
    average = None if changed.average is None else weights
    changed.load_state_dict({**saved, "model": weights, "optimizers": optimizers, "average": average})


def _save(
    change: Change, operation: Operation, run: Path, saved: dict[str, Any], state: dict[str, Any], output: Path
) -> None:
    """Write the new run, which a tracker does not know yet."""
    became = "; ".join(f"{name}: {what}" for name, what in change.said.items())
    sentence = f"{type(operation).__name__} of {run}: {became}."
    position = saved["position"]
    position = {**position, "tracking_id": None, "changes": [*position.get("changes", []), sentence]}
    state = {**saved, "engine": state, "position": position, "config": settings_of(change.config)}
    with own_folder(change.config, resume=False):
        save_config(change.config, output / CONFIG)
        save_checkpoint(state, output / "checkpoints", state["engine"]["step_count"])
