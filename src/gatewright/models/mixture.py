"""What every ready-made model says of its mixture, and the mixture it makes of it."""

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, cast

from torch import nn

from gatewright.dispatch import Capacity, Dispatcher, Priority
from gatewright.experts import ModuleExperts
from gatewright.layers.moe import MoE
from gatewright.models.deepspeed_moe import DeepSpeedMoE
from gatewright.models.options import check_options
from gatewright.names import known
from gatewright.routers import ROUTERS, ExpertDropout, Hashed, Router, Soft

RouterOption = bool | int | float | str | None

CHOOSABLE_ROUTERS = MappingProxyType({name: make for name, make in ROUTERS.items() if make is not Hashed})
"""The routers that a ready-made model can have, by name: those that route by features."""

HASHED_NEEDS_KEYS = (
    "The router hashed takes integer keys, and a recipe's model hands its router features. Choose another router, or "
    "build gatewright.MoE yourself and call moe(x, features=keys)."
)


@dataclass(frozen=True, kw_only=True)
class MixtureConfig:
    """The settings of a mixture of experts inside a model.

    Args:
        num_experts: How many experts; 1 makes the dense twin: the expert alone, without a router.
        top_k: Experts per item, where the router chooses some.
        router: A name in `gatewright.models.CHOOSABLE_ROUTERS`; ``gatewright list`` prints them.
        router_options: Further keyword arguments of the router, by their names in its signature.
        expert_dropout: Probability of discarding an assignment in training (`ExpertDropout`).
        losses: Coefficient per auxiliary loss; None takes the router's own.
        dispatch: ``"dropless"``, or ``"capacity"`` with the three settings that follow.
        capacity_factor: Room per expert over the even share, in training.
        min_capacity: Least rows per expert, in training.
        priority: Which items are served first where room is short.
        upcycle_epoch: Epoch, counted from 0, before which a run trains the dense twin, and at which every expert begins
            as a copy of its one expert; 0 trains a mixture from the start. Experts from scratch learn from their share
            of the items alone, and starve where they are whole networks.
        layer: ``"gatewright"``; or ``"deepspeed"``, DeepSpeed's own layer with its own top-k gate, to compare with. The
            router options are that layer's keyword arguments then.
    """

    num_experts: int = 8
    top_k: int = 2
    router: str = "noisy-top-k"
    router_options: dict[str, RouterOption] = field(default_factory=dict)
    expert_dropout: float = 0.0
    losses: dict[str, float] | None = None
    dispatch: Literal["dropless", "capacity"] = "dropless"
    capacity_factor: float = 1.25
    min_capacity: int = 4
    priority: Priority = "arrival"
    upcycle_epoch: int = 0
    layer: Literal["gatewright", "deepspeed"] = "gatewright"

    def build_router(self, dim: int) -> Router:
        """Make the router for features of a size.

        Raises:
            ValueError: If the router or one of its options is unknown, a value does not fit, or the router needs keys.
        """
        if self.router == "hashed":
            raise ValueError(HASHED_NEEDS_KEYS)
        make = CHOOSABLE_ROUTERS[known(self.router, CHOOSABLE_ROUTERS, "router")]
        sizes = {"top_k": self.top_k} if "top_k" in inspect.signature(make).parameters else {}
        given = ("dim", "num_experts", *sizes)
        check_options(make, self.router_options, f"the router {self.router}", given=given)
        # A ready-made model routes images: mixed with each other, one's class would depend on the rest of its batch.
        ungrouped = {"group_size": 1} if make is Soft else {}
        router = make(dim, self.num_experts, **sizes, **ungrouped | cast(dict[str, Any], self.router_options))
        return ExpertDropout(router, self.expert_dropout) if self.expert_dropout else router

    def build_dispatcher(self) -> Dispatcher | None:
        """Make the dispatcher; None is the router's own, which drops nothing.

        Raises:
            ValueError: If there is a capacity and the router sends nothing that could exceed it.
        """
        if self.dispatch == "dropless":
            return None
        if CHOOSABLE_ROUTERS[known(self.router, CHOOSABLE_ROUTERS, "router")].dense:
            raise ValueError(
                f"A capacity bounds what tokens send to an expert, and the router {self.router} mixes all tokens into "
                "slots of a fixed number; got dispatch='capacity'. Use dispatch='dropless'."
            )
        return Capacity(self.capacity_factor, self.min_capacity, self.priority)

    def build_mixture(
        self, make_expert: Callable[[], nn.Module], *, router_dim: int, item_shape: tuple[int, ...]
    ) -> nn.Module:
        """Make the mixture, or with one expert that expert itself."""
        if self.num_experts == 1:
            return make_expert()
        if self.layer == "deepspeed":
            return self._build_theirs(make_expert, router_dim, item_shape)
        return MoE(
            self.build_router(router_dim),
            ModuleExperts(make_expert, self.num_experts),
            item_shape=item_shape,
            dispatcher=self.build_dispatcher(),
            losses=self.losses,
        )

    def _build_theirs(
        self, make_expert: Callable[[], nn.Module], router_dim: int, item_shape: tuple[int, ...]
    ) -> nn.Module:
        """Make DeepSpeed's layer, with the same room per expert in evaluation as in training."""
        if router_dim != math.prod(item_shape):
            raise ValueError(
                f"DeepSpeed's gate looks at the item itself, {math.prod(item_shape)} numbers for items of shape "
                f"{item_shape}, and this model's router at {router_dim} features. Use cifar10-cnn, or --model.layer "
                "gatewright."
            )
        room = {"capacity_factor": self.capacity_factor, "eval_capacity_factor": self.capacity_factor}
        room |= {"min_capacity": self.min_capacity, "drop_tokens": self.dispatch == "capacity"}
        options = {**room, **self.router_options}
        return DeepSpeedMoE(
            make_expert, self.num_experts, self.top_k, item_shape=item_shape, losses=self.losses, options=options
        )
