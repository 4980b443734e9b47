"""Training, from a config to a result: read `train` from top to bottom."""

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gatewright.layers.base import moe_layers
from gatewright.metrics import load_share
from gatewright.tasks import Batch, task_named
from gatewright.train.build import build_engine, upcycle_engine
from gatewright.train.checkpoint.format import newest_checkpoint
from gatewright.train.checkpoint.resume import saved_fingerprint
from gatewright.train.checkpoint.writer import Saver
from gatewright.train.conclude import conclude, evaluate_part
from gatewright.train.config import RunConfig
from gatewright.train.config_file import save_config, settings_of
from gatewright.train.device import expected_device, find_device
from gatewright.train.diagnosis import TrainingDiverged
from gatewright.train.folder import CONFIG, agreed_state, own_folder, resume_command
from gatewright.train.launch.join import join_processes, place_in_run
from gatewright.train.launch.signals import Interrupted, StopRequest
from gatewright.train.pace import Pace
from gatewright.train.phases import is_dense
from gatewright.train.preview import announcement
from gatewright.train.progress import Progress
from gatewright.train.result import evaluation_metrics, layer_metrics
from gatewright.train.run import Position, Run
from gatewright.train.step import StepReport, TorchEngine
from gatewright.train.strategies.single import largest
from gatewright.train.tracking.tracked import tracked
from gatewright.train.validate import check_start, tell_changes, validate

Report = Callable[[Path], Sequence[Path]]
"""Writes what there is to see of a finished run into its folder, and returns the paths."""


def train(
    config: RunConfig, *, resume: bool = False, recipe: RunConfig | None = None, report: Report | None = None
) -> tuple[dict[str, Any], Path]:
    """Train a model, evaluate it on the test set once, and write everything into the run's folder.

    Args:
        config: The run.
        resume: Go on from the newest checkpoint in the run's folder; on CPU the weights are bit-equal to those of an
            uninterrupted run.
        recipe: The settings that the recipe itself has; the result and the report say what the run changes of them.
        report: Called on the first process with the run's folder when the result is in it, such as
            `gatewright.report.write_all`; the files that it writes are tracked with the run.

    Returns:
        The content of ``result.json``, and the run's folder.

    Raises:
        FileExistsError: If the folder holds a run already and `resume` is not set, or is a file, or another run is
            training in it.
        FileNotFoundError: If there is nothing to resume, or the data are not there.
        ConnectionError: If the tracking server does not answer at the start.
        OSError: If the disk is full; the older checkpoints are intact.
        ValueError: If the settings, the data or the run to resume do not fit together.
        TrainingDiverged: If a loss or a gradient is not finite.
        LostProcess: If another process is gone, hangs or cannot be reached.
        Interrupted: If Ctrl-C or SIGTERM stopped the run; it saved itself first.
    """
    check_start(config, resume)
    world, local_rank = place_in_run(config)
    validate(config, world, expected_device(config.device, world, local_rank))
    with join_processes(config) as strategy, own_folder(config, resume, strategy) as output:
        device = find_device(config.device, strategy.local_rank)
        saved = agreed_state(output, strategy) if resume else None
        position = Position(**saved["position"]) if saved else Position(dense=is_dense(config, 0))
        if saved:
            position.changes.extend(tell_changes(config, saved, quiet=strategy.rank > 0))
        torch.manual_seed(config.seed)
        with tracked(config, output, position.tracking_id, strategy) as tracker:
            position.tracking_id = tracker.run_id or position.tracking_id
            task = task_named(config.task)
            splits = task.load(config.data, config.model)
            tracker.log_data(data := task.describe_data(config.data, splits))
            if saved:
                task.check(task.fingerprint(splits.train), saved_fingerprint(saved))
            checkpoints = output / "checkpoints"
            own = checkpoints / config.engine
            engine = build_engine(config, splits, device, strategy, folder=own, dense=position.dense)
            if saved:
                load_into(engine, saved["engine"], output)
            strategy.barrier()
            if strategy.rank == 0:  # Only now: settings that do not fit leave no run behind, and spoil none.
                save_config(config, output / CONFIG)
            saver = Saver(checkpoints, strategy, in_background=config.checkpoint_in_background)
            with saver, last_good_named(checkpoints):
                pace = Pace(engine.model, strategy)
                training = task.on_device(splits.train, device)
                run = Run(
                    config, recipe, report, output, task, splits, training, data, engine, tracker, position, saver, pace
                )  # fmt: skip
                run = train_epochs(run)
            try:
                return conclude(run), output
            except KeyboardInterrupt as stop:
                raise Interrupted(_how_to_resume(run), signal.SIGINT) from stop


@contextlib.contextmanager
def last_good_named(checkpoints: Path) -> Iterator[None]:
    """Say of a run that diverged which checkpoint is the last good one.

    A checkpoint that was written right before the step that diverged is not called good: nothing finite came of it.
    """
    try:
        yield
    except TrainingDiverged as error:
        good = newest_checkpoint(checkpoints, before=error.step)
        message = f"{error} The last good checkpoint: {good or 'none yet'}."
        raise TrainingDiverged(message, error.step) from error


def load_into(engine: TorchEngine, state: dict[str, Any], output: Path) -> None:
    """Go on from a state; an error names the run."""
    try:
        engine.load_state_dict(state)
    except ValueError as error:
        raise ValueError(f"{output}: {error}") from error


def train_epochs(run: Run) -> Run:
    """Train from the run's position to the last epoch, saving after every few epochs and when asked to stop.

    Returns:
        The run with the engine of its last phase.
    """
    config, position = run.config, run.position
    began = time.monotonic() - position.train_seconds
    with StopRequest() as stop, _progress(run) as progress:
        progress.line(_announcement(run))
        while position.epoch < config.epochs:
            run = begin_phase(run)
            stopped_by: int | None = None
            for micro_batches in _steps(run):
                progress.advance(_step(run, micro_batches))
                position.train_seconds = time.monotonic() - began
                stopped_by = largest(run.engine.strategy, stop.signal_number)
                if position.step < run.engine.steps_per_epoch and (stopped_by is not None or _is_due(run)):
                    _save(run)
                    _stop(run, stopped_by)
            position.epoch, position.step = position.epoch + 1, 0
            progress.line(_log_epoch(run))
            position.train_seconds = time.monotonic() - began
            # Once for each step: a second checkpoint of the same one would replace files that make up the first.
            last = position.epoch == config.epochs or stopped_by is not None
            if last or position.epoch % config.checkpoint_every == 0 or _is_due(run):
                _save(run)
            _stop(run, stopped_by)
        run.saver.wait()
        _stop(run, largest(run.engine.strategy, stop.signal_number))
    return run


def begin_phase(run: Run) -> Run:
    """Return the run with its mixture, where the epoch has come at which the dense twin becomes one."""
    config, position = run.config, run.position
    if not position.dense or is_dense(config, position.epoch):
        return run
    engine = upcycle_engine(run.engine, config, run.splits, folder=run.saver.folder / config.engine)
    position.dense = False
    return replace(run, engine=engine, pace=run.pace.going_on_with(engine.model))


def _stop(run: Run, signal_number: int | None) -> None:
    """End a run that was asked to, once what it saved is written."""
    if signal_number is not None:
        run.saver.wait()
        raise Interrupted(_how_to_resume(run), signal_number)


def _progress(run: Run) -> Progress:
    total = run.config.epochs * run.engine.steps_per_epoch
    return Progress(total, run.engine.step_count, show=run.engine.strategy.rank == 0)


def _announcement(run: Run) -> str:
    steps, done, device = run.engine.steps_per_epoch, run.engine.step_count, run.engine.device
    return announcement(run.config, run.splits, run.output, device=device, steps_per_epoch=steps, done=done)


def _steps(run: Run) -> Iterator[list[Batch]]:
    """Yield the micro-batches of each optimizer step that the epoch still has."""
    config, position = run.config, run.position
    per_step = config.optim.accumulation_steps
    batches = run.task.training_batches(
        run.training, config.data, seed=config.seed, epoch=position.epoch, start=position.step * per_step
    )
    for _ in range(position.step, run.engine.steps_per_epoch):
        yield list(islice(batches, per_step))


def _step(run: Run, micro_batches: list[Batch]) -> float | None:
    """Make a step, and return its loss if it is one that is logged; the device is waited for in no other step."""
    position, engine = run.position, run.engine
    position.step += 1
    last = position.step == engine.steps_per_epoch  # A short run is to have its curves, too.
    is_logged = last or (engine.step_count + 1) % run.config.tracking.log_interval == 0
    with run.pace.step():
        report = engine.step(micro_batches)
        if is_logged:
            engine.check_finite()
    engine.strategy.report_steps(engine.step_count)
    return _log_step(run, report, sum(map(run.task.count, micro_batches))) if is_logged else None


def _log_step(run: Run, report: StepReport, num_items: int) -> float:
    values = {f"train/{name}": float(value) for name, value in asdict(report).items()}
    for name, layer in moe_layers(run.engine.model):
        values |= {f"train/layers/{name}/{loss}_loss": float(value) for loss, value in layer.loss_values.items()}
    scopes = {name: layer.scope for name, layer in moe_layers(run.engine.model)}
    for name, sums in run.engine.take_sums().items():
        values |= layer_metrics(name, sums.over(scopes[name]).map(Tensor.cpu), "train")  # of the global batch
    values[f"train/{run.task.item}s_per_second"] = num_items / run.pace.step_seconds
    values |= run.pace.metrics()
    run.tracker.log_metrics(values, run.engine.step_count)
    return values["train/task_loss"]


def _log_epoch(run: Run) -> str:
    """Evaluate on what is held out, track it, and return the line to print."""
    line = f"epoch {run.position.epoch}/{run.config.epochs}  {run.position.train_seconds:.0f} s"
    if len(run.splits.holdout) == 0:
        return line
    evaluation = evaluate_part(run, run.splits.holdout)
    seconds = {"holdout/train_seconds": run.position.train_seconds}
    run.tracker.log_metrics(evaluation_metrics("holdout", evaluation) | seconds, run.engine.step_count)
    shares = [load_share(use.sums) for use in evaluation.layers.values()]
    loads = "".join(f"  load {share.min():.1%} to {share.max():.1%}" for share in shares)
    return f"{line}  held-out {' '.join(evaluation.headline)}{loads}"


def _is_due(run: Run) -> bool:
    """Whether a checkpoint is to be written after this step, whatever the epoch."""
    every = run.config.checkpoint_every_steps
    return every is not None and run.engine.step_count % every == 0


def _save(run: Run) -> None:
    run.saver.wait()  # A checkpoint of the engine's own replaces older ones, of which this may still be one.
    state = {
        "engine": run.engine.state_dict(part=True),
        "position": asdict(run.position),
        "config": settings_of(run.config),
        "fingerprint": run.task.fingerprint(run.splits.train),
        "steps_per_epoch": run.engine.steps_per_epoch,
    }
    run.saver.save(state, run.engine.model, run.engine.step_count)


def _how_to_resume(run: Run) -> str:
    epoch, step = run.position.epoch, run.position.step
    where = f"in epoch {epoch + 1} after {step} of its steps" if epoch < run.config.epochs else "before the final test"
    return f"Stopped {where}, and saved. Go on with: {resume_command(run.config, run.output)}"
