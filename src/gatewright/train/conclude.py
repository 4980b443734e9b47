"""The end of a run: the evaluation of the test set, the result, and its report."""

from typing import Any

from gatewright.tasks import Evaluation
from gatewright.train.evaluate import evaluate
from gatewright.train.folder import CONFIG
from gatewright.train.provenance import describe_origin
from gatewright.train.result import describe_result, evaluation_metrics, hardware, versions, write_json
from gatewright.train.run import Run


def conclude(run: Run) -> dict[str, Any]:
    """Evaluate on the test set, and write and track the result with its report."""
    evaluation = evaluate_part(run, run.splits.test)
    example = next(run.task.evaluation_batches(run.splits.test, min(len(run.splits.test), 256)))
    result = {
        "recipe": run.config.recipe,
        "seed": run.config.seed,
        "epochs": run.config.epochs,
        "resumed_with": run.position.changes,
        "train_seconds": round(run.position.train_seconds, 2),
        **describe_origin(run.config, run.recipe, run.data),
        **describe_result(run.task, run.engine.evaluated, evaluation, example, run.engine.strategy),
        "item": run.task.item,
        "items_per_step": run.config.data.items_per_batch * run.config.optim.accumulation_steps,
        "num_test_items": run.task.size(run.splits.test),
        "test_headline": list(evaluation.headline),
        "higher_is_better": evaluation.higher_is_better,
        "class_names": list(run.task.class_names(run.splits.test)),
        "versions": versions(run.engine.libraries),
        "hardware": hardware(run.engine.device),
        "processes": run.pace.summary(run.engine.device),
        "tracking": run.tracker.location,
    }
    for name, said in run.task.inspect(run.engine.evaluated, run.splits.test).items():
        result["layers"][name] |= said
    if run.engine.strategy.rank > 0:
        return result
    write_json(result, run.output / "result.json")
    run.task.write_examples(run.config.data, run.splits.test, run.output / "examples")
    run.tracker.log_metrics(evaluation_metrics("test", evaluation), run.engine.step_count)
    written = run.report(run.output) if run.report else ()
    for path in (*written, run.output / "result.json", run.output / CONFIG):
        run.tracker.log_artifact(path)
    return result


def evaluate_part(run: Run, part: Any) -> Evaluation:
    """Evaluate the run's model, as it is now, on a part of its data."""
    run.engine.strategy.average_buffers(run.engine.evaluated)
    batch_size, precision = run.config.data.eval_batch_size, run.config.precision
    model, strategy = run.engine.evaluated, run.engine.strategy
    return evaluate(run.task, model, part, batch_size=batch_size, precision=precision, strategy=strategy)
