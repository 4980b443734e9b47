"""Layers with a router: the mixture, its soft and its merged form, and a mixture beside a dense branch."""

from gatewright.layers.base import RoutedLayer, aux_loss, end_step, moe_layers, seed_noise
from gatewright.layers.merged import MergedMoE
from gatewright.layers.moe import MoE
from gatewright.layers.replay import record_routing, replay_routing
from gatewright.layers.residual import ResidualMixture
from gatewright.layers.soft import SoftMoE

ExpertLayer = MoE | SoftMoE
"""A layer that sends rows to experts, each of which may live in another process."""

__all__ = [
    "ExpertLayer",
    "MergedMoE",
    "MoE",
    "ResidualMixture",
    "RoutedLayer",
    "SoftMoE",
    "aux_loss",
    "end_step",
    "moe_layers",
    "record_routing",
    "replay_routing",
    "seed_noise",
]
