"""Copies that are to become different experts: noise, or hidden units drawn anew."""

import torch
from torch import Tensor, nn

from gatewright.experts import ModuleExperts
from gatewright.layers import ExpertLayer
from gatewright.layers.base import moe_layers
from gatewright.surgery.feed_forward import hidden_units_of


@torch.no_grad()
def add_noise(model: nn.Module, scale: float, *, generator: torch.Generator | None = None) -> nn.Module:
    """Add Gaussian noise to the parameters of every expert that is a module, each expert its own.

    Args:
        model: A model with mixtures, such as `upcycle` returns. It is changed in place, and returned.
        scale: Standard deviation of the noise, as a share of that of each parameter's values.
        generator: Generator that the noise is drawn from; by default torch's own.

    Raises:
        ValueError: If the scale is negative, or no mixture has modules as experts.
    """
    if not 0 <= scale < float("inf"):
        raise ValueError(f"scale is finite and not negative; got {scale}.")
    for expert in _experts_of(model):
        for parameter in expert.parameters():
            if parameter.is_floating_point() and parameter.numel() > 1:
                parameter.add_(noise_like(parameter, scale, generator))
    return model


@torch.no_grad()
def reinitialize(model: nn.Module, share: float = 0.5, *, generator: torch.Generator | None = None) -> nn.Module:
    """Draw a share of the hidden units of every expert anew, each expert's own: Drop-Upcycling.

    The weights of these units, in all matrices of the block, are drawn from the normal distribution with the mean and
    the standard deviation of those that they replace: https://arxiv.org/abs/2502.19261 section 3. Biases stay.

    Args:
        model: A model with mixtures of feed-forward blocks, such as `upcycle` returns. It is changed in place, and
            returned.
        share: Share of the hidden units that is drawn anew; one half was best in the paper.
        generator: Generator that units and weights are drawn from; by default torch's own.

    Raises:
        ValueError: If the share is outside ``[0, 1]``, or an expert is not a feed-forward block; nothing has changed.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share lies in [0, 1]; got {share}. The paper uses 0.5.")
    for units in [hidden_units_of(expert) for expert in _experts_of(model)]:
        chosen = torch.randperm(units.number, generator=generator)[: round(share * units.number)]
        for weight, index in units.slices(chosen.to(units.after.weight.device)):
            old = weight[index]
            if old.numel() > 1:
                weight[index] = old.mean() + old.std() * _normal(old, generator)
    return model


def _experts_of(model: nn.Module) -> list[nn.Module]:
    layers = [layer for _, layer in moe_layers(model) if isinstance(layer, ExpertLayer)]
    found = [expert for layer in layers if isinstance(layer.experts, ModuleExperts) for expert in layer.experts.experts]
    if not found:
        raise ValueError(
            "Experts are told apart that are modules, each with parameters of its own; this model has no such mixture. "
            "Call upcycle first."
        )
    return found


def noise_like(values: Tensor, scale: float, generator: torch.Generator | None) -> Tensor:
    """Draw noise whose standard deviation is a share of that of some values."""
    return scale * values.std() * _normal(values, generator)


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Draw on the CPU where the generator is, so that the values are the same on every device."""
    device = like.device if generator is None else generator.device
    return torch.randn(like.shape, generator=generator, device=device, dtype=torch.float32).to(like)
