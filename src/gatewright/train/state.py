"""The state of an engine: all that its next step depends on, as one process alone would have it."""

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from gatewright.train.optim import load_named_state, named_state

if TYPE_CHECKING:
    from gatewright.train.step import TorchEngine


def logical_state(engine: "TorchEngine", *, part: bool = False) -> dict[str, Any]:
    """Return the state of an engine in tensors and numbers, which does not depend on the number of processes.

    Every process calls this. The first one gets the whole; or each gets the part that it saves.
    """
    engine.check_finite()
    engine.strategy.average_buffers(engine.model, engine.evaluated)
    gather = partial(engine.strategy.gather_state, model=engine.model, part=part)
    average = engine.average
    return {
        "settings": engine.fixed_settings(),
        "model": gather(engine.weights()),
        "optimizers": [gather(named_state(optimizer, engine.model)) for optimizer in engine.optimizers],
        "scaler": engine.scaler.state_dict(),
        "average": None if average is None else gather(average.module.state_dict()),
        "averaged": 0 if average is None else int(average.n_averaged),
        "step_count": engine.step_count,
        "random_state": torch.get_rng_state(),
        "cuda_random_state": torch.cuda.get_rng_state_all() if engine.device.type == "cuda" else [],
    }


def load_logical_state(engine: "TorchEngine", state: dict[str, Any]) -> None:
    """Have an engine go on from what `logical_state` returned, at any number of processes.

    Raises:
        ValueError: If it belongs to another model, or to settings whose state this engine does not have.
    """
    if state["settings"] != engine.fixed_settings():
        raise ValueError(
            "A run goes on with the settings that decide what it keeps, as it began: "
            f"{_changes(state['settings'], engine.fixed_settings())}. Leave the flags out that change them."
        )
    own = partial(engine.strategy.load_state, model=engine.model)
    engine.load_weights(own(state["model"]))
    for optimizer, saved in zip(engine.optimizers, state["optimizers"], strict=True):
        load_named_state(optimizer, own(saved), engine.model)
    engine.scaler.load_state_dict(state["scaler"])
    if engine.average is not None:
        load_weights(engine.average.module, own(state["average"]))
        engine.average.n_averaged.fill_(state["averaged"])
    engine.step_count = state["step_count"]
    torch.set_rng_state(state["random_state"])
    if engine.device.type == "cuda" and len(state["cuda_random_state"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda_random_state"])


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a model's state, and refuse one of another model."""
    if any(name.endswith("mixture._extra_state") for name in weights):
        raise ValueError(
            "The checkpoint is of an earlier version, in which experts that begin as one network were part of the "
            "mixture. Go on with that version, or begin the run again."
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]  # below torch's heading
        raise ValueError(
            f"The checkpoint holds another model than this config describes: {first[0].strip()}"
        ) from error


def _changes(before: dict[str, Any], now: dict[str, Any]) -> str:
    changed = (name for name in {**before, **now} if before.get(name) != now.get(name))
    return "; ".join(f"{name.replace('_', ' ')} was {before.get(name)} and is {now.get(name)}" for name in changed)
