"""Optimizers, each for the parameters it suits, and the learning rate."""

import math
from collections.abc import Iterable

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from gatewright.train.config import OptimConfig
from gatewright.train.muon import FORMS, Muon
from gatewright.train.roles import Role, parameter_roles

FUSED = ("cpu", "cuda", "mps", "xpu")
"""The devices on which torch has fused AdamW and SGD."""


def build_optimizers(model: nn.Module, config: OptimConfig) -> list[Optimizer]:
    """Make the optimizers of a model: one, or with Muon two.

    Muon (https://kellerjordan.github.io/posts/muon/) takes the matrices of linear layers and experts and the filters of
    convolutions; AdamW takes the rest beside it. Biases and norms do not decay, also where those of all experts are
    stacked in one parameter.

    Raises:
        ValueError: If Muon is asked for and the model has neither a matrix nor a filter.
    """
    roles = {parameter: role for parameter, role in parameter_roles(model).items() if parameter.requires_grad}
    if config.name == "muon":
        return _muon_and_adamw(roles, config)
    groups = _groups(roles, config.lr, config.weight_decay)
    if config.name == "sgd":
        sharded = any(isinstance(parameter, DTensor) for parameter in roles)  # Of shards torch has no fused SGD.
        at_once = {"foreach": True} if sharded else {"fused": _fused(roles)}
        sgd = SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, **at_once)
        if config.momentum > 0:
            sgd.register_step_pre_hook(_begin_momentum)
        return [sgd]
    return [AdamW(groups, betas=config.betas, fused=_fused(roles))]


def _begin_momentum(optimizer: Optimizer, *_: object) -> None:
    """Begin with no momentum where there is none yet: fused SGD takes that of all parameters, or of none."""
    for parameter in (parameter for group in optimizer.param_groups for parameter in group["params"]):
        if parameter.grad is not None and optimizer.state[parameter].get("momentum_buffer") is None:
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)


def _fused(parameters: Iterable[nn.Parameter]) -> bool | None:
    """Ask for torch's one kernel for all parameters where there is one for their device."""
    return all(parameter.device.type in FUSED for parameter in parameters) or None


def _muon_and_adamw(roles: dict[nn.Parameter, Role], config: OptimConfig) -> list[Optimizer]:
    found = dict.fromkeys(roles.values())
    forms = {form: [parameter for parameter, role in roles.items() if role == form] for form in found if form in FORMS}
    if not forms:
        raise ValueError(
            "Muon changes matrices and filters, and this model has neither; its parameters are "
            f"{', '.join(found) or 'none'}. Use optim.name adamw or sgd."
        )
    matrices = [{"params": parameters, "form": form} for form, parameters in forms.items()]
    muon = Muon(matrices, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    rest = {parameter: role for parameter, role in roles.items() if role not in FORMS}
    adam_lr = config.lr if config.adam_lr is None else config.adam_lr
    groups = _groups(rest, adam_lr, config.weight_decay)
    return [muon, *([AdamW(groups, betas=config.betas, fused=_fused(rest))] if rest else [])]


def stop_at(failed: Float[Tensor, ""], optimizers: Iterable[Optimizer]) -> None:
    """Have optimizers change nothing where a tensor on the device is 1; those that are not fused cannot."""
    for optimizer in optimizers:
        if optimizer.defaults.get("fused", isinstance(optimizer, Muon)):
            optimizer.found_inf = failed  # type: ignore[attr-defined]  # as torch.amp.GradScaler does


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
        num_steps: Number of optimizer steps of the whole run.
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


def _groups(roles: dict[nn.Parameter, Role], lr: float, weight_decay: float) -> list[dict[str, object]]:
    """Split parameters into those that decay and the biases and norms, which do not; and shards from whole ones.

    Torch updates the parameters of a group at once, and these are all whole or sharded over the same processes.
    """
    groups: dict[tuple[float, object], list[nn.Parameter]] = {}
    for parameter, role in roles.items():
        decay = 0.0 if role in ("bias", "norm") else weight_decay
        groups.setdefault((decay, parameter.device_mesh if isinstance(parameter, DTensor) else None), []).append(
            parameter
        )
    in_order = sorted(groups.items(), key=lambda group: -group[0][0])
    return [{"params": members, "lr": lr, "weight_decay": decay} for (decay, _), members in in_order]


def clip_gradients(model: nn.Module, max_norm: float | None, norm: Tensor | None = None) -> Float[Tensor, ""]:
    """Scale all gradients down to a total norm, and return the norm they had, without waiting for the device.

    Args:
        model: The model, with gradients.
        max_norm: The largest norm that is left as it is; None scales nothing.
        norm: The norm of all gradients, where this process does not have all of them.
    """
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    norm = nn.utils.get_total_norm(gradients) if norm is None else norm
    if max_norm is not None:
        mixed = any(isinstance(gradient, DTensor) for gradient in gradients)
        nn.utils.clip_grads_with_norm_(model.parameters(), max_norm, norm, foreach=False if mixed else None)
    return norm


def named_state(optimizer: Optimizer, model: nn.Module) -> dict[str, Tensor]:
    """Return what an optimizer keeps of each parameter of a model, as ``"name of the parameter|what"``."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    kept = ((names[parameter], values) for parameter, values in optimizer.state.items() if parameter in names)
    return {
        f"{name}|{what}": value for name, values in kept for what, value in values.items() if isinstance(value, Tensor)
    }


def load_named_state(optimizer: Optimizer, named: dict[str, Tensor], model: nn.Module) -> None:
    """Give an optimizer such a state, in the memory layout of its parameters, so that resuming is bit-equal.

    What is kept of parameters that another optimizer changes by now is left out.
    """
    parameters = dict(model.named_parameters())
    own = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    optimizer.state.clear()
    for name, value in named.items():
        owner, what = name.rsplit("|", 1)
        like = parameters[owner]
        if like not in own:
            continue
        was_number = what != "step" and value.numel() == like.numel() == 1  # `Soft.scale`, in older checkpoints
        if what != "step" and (value.shape == like.shape or was_number):
            own_value = torch.empty_like(like, dtype=value.dtype, requires_grad=False).copy_(value)
        else:  # Several copies may go on from one, and each counts its own steps, where its kernel reads them.
            own_value = value.to(like.device if own[like].get("fused") else "cpu", copy=True)
        optimizer.state[like][what] = own_value
