"""Layers with a router: the mixture itself, merged experts, and a mixture beside a residual path."""

from gatewright.layers.base import RoutedLayer, aux_loss, end_step, moe_layers, seed_noise
from gatewright.layers.merged import MergedMoE
from gatewright.layers.moe import MoE
from gatewright.layers.residual import ResidualMixture

__all__ = [
    "MergedMoE",
    "MoE",
    "ResidualMixture",
    "RoutedLayer",
    "aux_loss",
    "end_step",
    "moe_layers",
    "seed_noise",
]
