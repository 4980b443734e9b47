"""Put a mixture of experts into any PyTorch model, train it, and see what the experts do.

The core, importable with torch alone: four nouns (`Router`, `Dispatcher`, `Experts`, `MoE`) and one record between them
(`Routing`). Start with `gatewright.reference`, which says in plain loops what all of it computes.
"""

from gatewright.dispatch import Capacity, Dispatcher, Dropless, ExpertBatch
from gatewright.experts import Experts, GroupedFeedForward, ModuleExperts
from gatewright.layers.base import RoutedLayer, aux_loss, end_step, moe_layers, seed_noise
from gatewright.layers.merged import MergedMoE
from gatewright.layers.moe import MoE
from gatewright.layers.replay import record_routing, replay_routing
from gatewright.layers.residual import ResidualMixture
from gatewright.layers.soft import SoftMoE
from gatewright.ops import backends
from gatewright.routers import (
    Biased,
    ExpertChoice,
    ExpertDropout,
    GroupLimited,
    Hashed,
    Hierarchical,
    NoisyTopK,
    ProductKey,
    Router,
    Sinkhorn,
    Soft,
    TokenGate,
    TopK,
)
from gatewright.routing import Routing
from gatewright.routing_sums import RoutingSums
from gatewright.scope import BatchScope

__version__ = "0.1.0"

__all__ = [
    "BatchScope",
    "Biased",
    "Capacity",
    "Dispatcher",
    "Dropless",
    "ExpertBatch",
    "ExpertChoice",
    "ExpertDropout",
    "Experts",
    "GroupLimited",
    "GroupedFeedForward",
    "Hashed",
    "Hierarchical",
    "MergedMoE",
    "MoE",
    "ModuleExperts",
    "NoisyTopK",
    "ProductKey",
    "ResidualMixture",
    "RoutedLayer",
    "Router",
    "Routing",
    "RoutingSums",
    "Sinkhorn",
    "Soft",
    "SoftMoE",
    "TokenGate",
    "TopK",
    "aux_loss",
    "backends",
    "end_step",
    "moe_layers",
    "record_routing",
    "replay_routing",
    "seed_noise",
]
