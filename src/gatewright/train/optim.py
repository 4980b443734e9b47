"""Optimizers and the learning rate: torch's own, chosen by name."""

import math
from collections.abc import Collection, Iterable

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Muon, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gatewright.train.config import OptimConfig


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """Make the optimizers of a model: one, or with Muon two.

    Muon (https://kellerjordan.github.io/posts/muon/) takes matrices only; torch's refuses filters and vectors, which
    AdamW takes beside it.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    # Torch's way of updating many parameters at once takes shards or whole ones, not both.
    foreach = False if any(isinstance(parameter, DTensor) for parameter in parameters) else None
    if config.name == "sgd":
        groups = _groups(parameters, config.lr, config.weight_decay)
        return [SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, foreach=foreach)]
    if config.name == "adamw":
        groups = _groups(parameters, config.lr, config.weight_decay)
        return [AdamW(groups, betas=config.betas, foreach=foreach)]
    matrices = [parameter for parameter in parameters if parameter.dim() == 2]
    if not matrices:
        raise ValueError("Muon works on matrices and this model has none. Use --optim.name adamw or sgd.")
    rest = [parameter for parameter in parameters if parameter.dim() != 2]
    adam_lr = config.lr if config.adam_lr is None else config.adam_lr
    muon = Muon(matrices, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    return [muon, *([AdamW(_groups(rest, adam_lr, config.weight_decay), betas=config.betas)] if rest else [])]


def averaged(model: nn.Module, decay: float | None) -> AveragedModel | None:
    """Make the running average of a model's weights and buffers; None where none is asked for."""
    if decay is None:
        return None
    return AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(decay), use_buffers=True)


def set_learning_rate(optimizers: Iterable[Optimizer], factor: float) -> None:
    """Set every group's rate to its largest rate times a factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group.setdefault("max_lr", group["lr"]) * factor


def rate_factor(config: OptimConfig, step: int, *, num_steps: int, steps_per_epoch: int) -> float:
    """Share of the largest learning rate at an optimizer step, in [0, 1]: a pure function, so nothing to resume.

    Args:
        config: Warm-up and schedule.
        step: Counted from 0.
        num_steps: Of the whole run.
        steps_per_epoch: Optimizer steps per epoch.
    """
    warmup_steps = min(round(config.warmup_epochs * steps_per_epoch), num_steps)
    if step < warmup_steps:
        if config.warmup == "log":
            return math.log(step + 1) / math.log(warmup_steps) if warmup_steps > 1 else 1.0
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(num_steps - warmup_steps, 1)
    if config.schedule == "constant":
        return 1.0
    return 1 - progress if config.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))


def _groups(parameters: list[nn.Parameter], lr: float, weight_decay: float) -> list[dict[str, object]]:
    """Split parameters into those that decay and vectors, which do not."""
    decayed = [parameter for parameter in parameters if parameter.dim() > 1]
    kept = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [(decayed, weight_decay), (kept, 0.0)]
    return [{"params": members, "lr": lr, "weight_decay": decay} for members, decay in groups if members]


def clip_gradients(model: nn.Module, max_norm: float | None) -> torch.Tensor:
    """Scale all gradients down to a total norm, and return the norm they had; one that is not finite scales nothing."""
    norm = nn.utils.get_total_norm(p.grad for p in model.parameters() if p.grad is not None)
    if max_norm is not None and torch.isfinite(norm):
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm)
    return norm


def named_state(optimizer: Optimizer, model: nn.Module, leave: Collection[Tensor] = ()) -> dict[str, Tensor]:
    """Return what an optimizer keeps of each parameter but some, as ``"name of the parameter|what"``."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    kept = ((names[parameter], values) for parameter, values in optimizer.state.items() if parameter not in leave)
    return {
        f"{name}|{what}": value for name, values in kept for what, value in values.items() if isinstance(value, Tensor)
    }


def load_named_state(optimizer: Optimizer, named: dict[str, Tensor], model: nn.Module) -> None:
    """Give an optimizer such a state, in the memory layout of its parameters, so that resuming is bit-equal."""
    parameters = dict(model.named_parameters())
    optimizer.state.clear()
    for name, value in named.items():
        owner, what = name.rsplit("|", 1)
        like = parameters[owner]
        if value.shape == like.shape:
            value = torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
        optimizer.state[like][what] = value
