"""What may change when a run goes on: one decision for every setting, and the sentence that says what it does."""

from collections.abc import Callable, Mapping
from typing import Any

from gatewright.models.blocks import BlocksConfig
from gatewright.tasks import EXACT, FROM_HERE, ROUNDING, Change, Decision, Rule, Task, refused, task_named
from gatewright.train.config import OptimConfig, RunConfig
from gatewright.train.config_file import settings_of
from gatewright.train.engines import ENGINES, engine_class
from gatewright.train.optim import rate_factor


def _epochs(change: Change) -> Decision:
    begun = change.epoch + (change.step > 0)
    return FROM_HERE if change.now >= begun else refused(f"it has begun {begun} epochs, which cannot be taken back")


def _top_k(change: Change) -> Decision:
    if isinstance(change.model, BlocksConfig) and not change.model.upcycle_epoch:
        return refused("an expert's hidden layer is `model.ffn` / `model.top_k` wide, which decides its weights")
    return FROM_HERE


def _upcycle_epoch(change: Change) -> Decision:
    if 0 in (change.before, change.now):
        return refused("a run begins either with a dense network or with a mixture")
    upcycled = (change.epoch, change.step) > (change.before, 0)
    return refused(f"it trains a mixture since epoch {change.before}") if upcycled else FROM_HERE


def _precision(change: Change) -> Decision:
    half = "float16" in (change.before, change.now)
    return refused("float16 keeps a loss scale, and the others have none") if half else FROM_HERE


def _on_or_off(what: str) -> Callable[[Change], Decision]:
    """Let a value change, but not to or from none."""
    return lambda change: FROM_HERE if change.before and change.now else refused(what)


NETWORK = refused("it decides which weights there are")
ORDER = refused("it decides which items a step sees: some would be seen twice in an epoch, or never")
DATA = refused("it decides which data there are")

DECISIONS: Mapping[str, Rule] = {
    "recipe": refused("the result bears its name"),
    "task": refused("it decides what is learned"),
    "seed": refused("weights, order, augmentation and noise come of it, and the result bears it"),
    "epochs": _epochs,
    "model.top_k": _top_k,
    "model.router_options": FROM_HERE,
    "model.expert_dropout": _on_or_off("a router that drops experts is another module than one that does not"),
    "model.backend": ROUNDING,
    "model.losses": FROM_HERE,
    "model.dispatch": FROM_HERE,
    "model.capacity_factor": FROM_HERE,
    "model.min_capacity": FROM_HERE,
    "model.priority": FROM_HERE,
    "model.upcycle_epoch": _upcycle_epoch,
    "data.batch_size": ORDER,
    "data.eval_batch_size": EXACT,
    "optim.name": refused("each optimizer keeps a state of its own"),
    "optim.lr": FROM_HERE,
    "optim.adam_lr": FROM_HERE,
    "optim.weight_decay": FROM_HERE,
    "optim.momentum": FROM_HERE,
    "optim.betas": FROM_HERE,
    "optim.warmup_epochs": FROM_HERE,
    "optim.warmup": FROM_HERE,
    "optim.schedule": FROM_HERE,
    "optim.clip_norm": FROM_HERE,
    "optim.accumulation_steps": ORDER,
    "optim.ema_decay": _on_or_off("averaged weights are kept from the first step on, or never"),
    "optim.label_smoothing": FROM_HERE,
    "tracking.enabled": EXACT,
    "tracking.name": EXACT,
    "tracking.uri": EXACT,
    "tracking.experiment": EXACT,
    "tracking.log_interval": EXACT,
    "parallel.ep_size": ROUNDING,
    "parallel.shard": ROUNDING,
    "parallel.balance": FROM_HERE,
    "parallel.batch_norm": FROM_HERE,
    "parallel.timeout": EXACT,
    "parallel.max_restarts": EXACT,
    "engine": ROUNDING,
    "processes": ROUNDING,
    "precision": _precision,
    "device": ROUNDING,
    "channels_last": ROUNDING,
    "compile": ROUNDING,
    "cuda_graphs": ROUNDING,
    "checkpoint_every": EXACT,
    "checkpoint_every_steps": EXACT,
    "checkpoint_in_background": EXACT,
    "output": EXACT,
}
"""What becomes of each setting that is changed, whatever the run's task and engine, which decide on their own settings.

A setting of the model that is not named decides which weights there are.
"""

LEAVES = ("model.router_options", "model.losses")  # settings that are mappings themselves
RATE = ("lr", "warmup_epochs", "warmup", "schedule")  # what of the optimizer decides the learning rate


def check_changes(config: RunConfig, saved: Mapping[str, Any]) -> list[str]:
    """Compare the settings of a run that goes on with those that its checkpoint was trained with.

    Returns:
        A sentence for each change of what is computed.

    Raises:
        ValueError: If a setting was changed that has to stay; the sentence has all of these.
    """
    changes = changes_since(config, saved)
    task, left = task_named(config.task), config.epochs > saved["position"]["epoch"]
    decisions = {name: _decide(name, rule_of(name, task), change, left=left) for name, change in changes.items()}
    refusals = [
        f"{name} was {changes[name].before!r} and is {changes[name].now!r}, but {decision.why}"
        for name, decision in decisions.items()
        if decision.kind == "refused"
    ]
    if refusals:
        raise ValueError(
            f"A run goes on with the settings that make it what it is: {'; '.join(refusals)}. Leave out what changes "
            "them, or begin another run."
        )
    said = [sentence for name, decision in decisions.items() if (sentence := _say(name, changes[name], decision))]
    return said + (_say_rate(config, saved) if changes.keys() & {"epochs", *(f"optim.{name}" for name in RATE)} else [])


def changes_since(config: RunConfig, saved: Mapping[str, Any]) -> dict[str, Change]:
    """Return every setting that is not what a checkpoint was trained with; one that is new since then is none."""
    before, now = flat(saved["config"]), flat(settings_of(config))
    position = saved["position"]
    return {
        name: Change(before[name], value, position["epoch"], position["step"], config.model)
        for name, value in now.items()
        if name in before and before[name] != value
    }


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by their dotted names."""
    found: dict[str, Any] = {}
    for key, value in settings.items():
        name = f"{prefix}{key}"
        nested = isinstance(value, dict) and name not in LEAVES
        found |= flat(value, f"{name}.") if nested else {name: value}
    return found


def rule_of(name: str, task: Task) -> Rule:
    """Return what becomes of a setting that is changed; what nobody decided on makes the network or the data."""
    rules = {**DECISIONS, **task.decisions}
    for engine in ENGINES:
        rules |= engine_class(engine).decisions
    return rules.get(name) or (NETWORK if name.startswith("model.") else DATA)


def _decide(name: str, rule: Rule, change: Change, *, left: bool) -> Decision:
    decision = rule(change) if callable(rule) else rule
    if decision is FROM_HERE and name != "epochs" and not left:
        return refused("the run is finished, so that nothing would be trained with it (more epochs would)")
    return decision


def _say(name: str, change: Change, decision: Decision) -> str | None:
    if decision.kind == "rounding":
        return f"{name} was {change.before!r} and is {change.now!r}: the same computation, but for rounding."
    if decision.kind == "from here":
        place = f"step {change.step} of epoch {change.epoch + 1}" if change.step else f"the end of epoch {change.epoch}"
        return f"{name} was {change.before!r} until {place}, and is {change.now!r} from there on."
    return None


def _say_rate(config: RunConfig, saved: Mapping[str, Any]) -> list[str]:
    """Say how the learning rate goes on, where it is the run's own to set."""
    step, before, per_epoch = saved["engine"]["step_count"], saved["config"], saved.get("steps_per_epoch")
    if config.deepspeed.config or saved["position"]["epoch"] >= config.epochs or not step or per_epoch is None:
        return []
    last = _rate(OptimConfig(**{name: before["optim"][name] for name in RATE}), step - 1, before["epochs"], per_epoch)
    following = _rate(config.optim, step, config.epochs, per_epoch)
    return [f"The learning rate was {last:.2g} in the last step and is {following:.2g} in the next."]


def _rate(optim: OptimConfig, step: int, epochs: int, per_epoch: int) -> float:
    return optim.lr * rate_factor(optim, step, num_steps=epochs * per_epoch, steps_per_epoch=per_epoch)


def saved_fingerprint(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what a task keeps in a checkpoint of its data; older checkpoints have it among their other keys."""
    older = {name: value for name, value in saved.items() if name not in ("config", "engine", "position")}
    found: Mapping[str, Any] = saved.get("fingerprint", older)
    return found
