"""What every ready-made model says of its mixture, and the mixture it makes of it."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import field, replace
from pkgutil import resolve_name
from types import MappingProxyType
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt
from torch import nn

from gatewright.dispatch import Capacity, Dispatcher, Priority
from gatewright.experts import Experts, GroupedFeedForward, ModuleExperts
from gatewright.experts.base import output_shape_of
from gatewright.layers import MergedMoE, MoE, ResidualMixture, RoutedLayer, SoftMoE
from gatewright.models.options import check_options
from gatewright.names import known
from gatewright.routers import ROUTERS, ExpertDropout, Hashed, Router, Soft
from gatewright.settings import settings

RouterOption = bool | int | float | str | None

CHOOSABLE_ROUTERS: Mapping[str, type[Router] | type[Soft]] = MappingProxyType(
    {name: make for name, make in ROUTERS.items() if make is not Hashed} | {"soft": Soft}
)
"""The routers that a ready-made model can have, by name: those that route by features."""

OTHER_LAYERS: Mapping[str, str] = MappingProxyType(
    {"deepspeed": "gatewright.integrations.deepspeed.layer:build_mixture"}
)
"""Layers of other libraries, by the name of the engine that trains them: where the function is that builds each."""

HASHED_NEEDS_KEYS = (
    "The router hashed takes integer keys, and a recipe's model hands its router features. Choose another router, or "
    "build gatewright.MoE yourself and call moe(x, features=keys)."
)


@settings("model")
class MixtureConfig:
    """The settings of a mixture of experts inside a model.

    Args:
        num_experts: Number of experts; 1 makes the dense twin: the expert alone, without a router.
        top_k: Experts per item, where the router chooses some.
        experts: The kind of experts: ``"modules"``, the model's own; ``"grouped"``, feed-forward networks with stacked
            weights in their place (`GroupedFeedForward`); or ``"merged"``, whose parameters are mixed for each item
            (`MergedMoE`).
        backend: The back-end of grouped experts without biases, such as a language model's, by a name that
            ``gatewright.backends()`` prints; None takes the first that takes the items.
        shared: Whether one more expert is applied to every item, and added with weight 1.
        residual: Whether the mixture stands beside one more expert that takes every item, with a learned share of each
            (`ResidualMixture`).
        router: The router, by a name in `gatewright.models.CHOOSABLE_ROUTERS`; ``gatewright list`` prints them.
        router_options: Further keyword arguments of the router, by their names in its signature.
        expert_dropout: Probability of discarding an assignment in training (`ExpertDropout`).
        losses: Coefficient per auxiliary loss; None takes the router's own.
        dispatch: The dispatcher: ``"dropless"``, or ``"capacity"`` with the three settings that follow.
        capacity_factor: Room per expert over the even share, in training.
        min_capacity: Least rows per expert, in training.
        priority: Order in which items are served where room is short.
        upcycle_epoch: Epoch, counted from 0, before which a run trains the dense twin, and at which every expert begins
            as a copy of its one expert; 0 trains a mixture from the start. Experts from scratch learn from their share
            of the items alone, and starve where they are whole networks.
        layer: The layer: ``"gatewright"``, or another library's layer to compare with, by a name in `OTHER_LAYERS`. The
            router options are then that layer's keyword arguments, and the engine of the same name trains it.
    """

    num_experts: PositiveInt = 8
    top_k: PositiveInt = 2
    experts: Literal["modules", "grouped", "merged"] = "modules"
    backend: str | None = None
    shared: bool = False
    residual: bool = False
    router: str = "noisy-top-k"
    router_options: dict[str, RouterOption] = field(default_factory=dict)
    expert_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    losses: dict[str, float] | None = None
    dispatch: Literal["dropless", "capacity"] = "dropless"
    capacity_factor: PositiveFloat = 1.25
    min_capacity: NonNegativeInt = 4
    priority: Priority = "arrival"
    upcycle_epoch: NonNegativeInt = 0
    layer: Literal["gatewright", "deepspeed"] = "gatewright"

    @property
    def needs_engine(self) -> bool:
        """Whether the mixture is another library's, which can build it only once its engine has started."""
        return self.layer in OTHER_LAYERS and self.num_experts > 1

    def with_experts(self, num_experts: int, top_k: int | None = None, **changes: Any) -> Self:
        """Return the settings of the network with another number of experts of the same size; one is dense.

        Args:
            num_experts: Number of experts.
            top_k: Experts per item; by default as before.
            changes: Other settings.
        """
        upcycle_epoch = self.upcycle_epoch if num_experts > 1 else 0
        top_k = self.top_k if top_k is None else top_k
        return replace(self, num_experts=num_experts, top_k=top_k, upcycle_epoch=upcycle_epoch, **changes)

    def build_router(self, dim: int) -> Router | Soft:
        """Make the router for features of a size.

        Raises:
            ValueError: If the router or one of its options is unknown, a value does not fit, or the router needs keys.
        """
        if self.router == "hashed":
            raise ValueError(HASHED_NEEDS_KEYS)
        make: Any = CHOOSABLE_ROUTERS[known(self.router, CHOOSABLE_ROUTERS, "router")]
        sizes = {"top_k": self.top_k} if "top_k" in inspect.signature(make).parameters else {}
        given = ("dim", "num_experts", *sizes)
        check_options(make, self.router_options, f"the router {self.router}", given=given)
        # A ready-made model routes images: mixed with each other, one's class would depend on the rest of its batch.
        ungrouped = {"group_size": 1} if make is Soft else {}
        made = make(dim, self.num_experts, **sizes, **ungrouped | cast(dict[str, Any], self.router_options))
        router: Router | Soft = ExpertDropout(made, self.expert_dropout) if self.expert_dropout else made
        return router

    def build_dispatcher(self) -> Dispatcher | None:
        """Make the dispatcher; None is the router's own, which drops nothing.

        Raises:
            ValueError: If there is a capacity and the router sends nothing that could exceed it.
        """
        if self.dispatch == "dropless":
            return None
        if self.router == "soft":
            raise ValueError(
                f"A capacity bounds what tokens send to an expert, and the router {self.router} mixes all tokens into "
                "slots of a fixed number; got dispatch='capacity'. Use dispatch='dropless'."
            )
        return Capacity(self.capacity_factor, self.min_capacity, self.priority)

    def build_mixture(
        self, make_expert: Callable[[], nn.Module], *, router_dim: int, item_shape: tuple[int, ...]
    ) -> nn.Module:
        """Make the mixture, or with one expert that expert itself."""
        if self.experts == "grouped":
            make_expert = _feed_forward_like(make_expert, item_shape)
        if self.num_experts == 1:
            return make_expert()
        if self.needs_engine:
            theirs: nn.Module = resolve_name(OTHER_LAYERS[self.layer])(self, make_expert, router_dim, item_shape)
            return theirs
        router = self.build_router(router_dim)
        if self.experts == "grouped":
            size = item_shape[0]
            grouped = GroupedFeedForward(
                self.num_experts, size, size, activation="relu", bias=True, backend=self.backend
            )
            return self.assemble(router, grouped, make_expert, item_shape)
        return self.assemble(router, None, make_expert, item_shape)

    def assemble(
        self,
        router: Router | Soft,
        experts: Experts | None,
        make_expert: Callable[[], nn.Module],
        item_shape: tuple[int, ...],
    ) -> nn.Module:
        """Put a router and experts together as the settings say; without experts, make them.

        Raises:
            ValueError: If settings exclude each other.
        """
        self._refuse_upcycling()
        if self.backend is not None and not isinstance(experts, GroupedFeedForward):
            raise ValueError(
                f"A back-end computes grouped experts; got backend={self.backend!r} and experts={self.experts!r}. Use "
                "experts='grouped', or leave backend out."
            )
        dispatcher = self.build_dispatcher()
        common: dict[str, Any] = {"item_shape": item_shape, "losses": self.losses}
        if self.experts == "merged":
            if isinstance(router, Soft) or dispatcher is not None or self.shared:
                raise ValueError(
                    "Merged experts run once for each item, with mixed parameters: they have no slots, no capacity and "
                    f"no shared expert; got router={self.router!r}, dispatch={self.dispatch!r}, shared={self.shared}. "
                    "Use experts='modules', or another router with dispatch='dropless' and shared=False."
                )
            return self._beside(MergedMoE(router, make_expert, self.num_experts, **common), make_expert)
        experts = experts or ModuleExperts(make_expert, self.num_experts)
        common["shared"] = make_expert() if self.shared else None
        if isinstance(router, Soft):
            return self._beside(SoftMoE(router, experts, **common), make_expert)
        return self._beside(MoE(router, experts, dispatcher=dispatcher, **common), make_expert)

    def _beside(self, layer: RoutedLayer, make_expert: Callable[[], nn.Module]) -> nn.Module:
        return ResidualMixture(layer, make_expert()) if self.residual else layer

    def _refuse_upcycling(self) -> None:
        if self.upcycle_epoch and (self.experts != "modules" or self.shared or self.residual):
            raise ValueError(
                "At upcycle_epoch the model's own expert is copied, so that every part of the mixture is a copy; got "
                f"upcycle_epoch={self.upcycle_epoch}, experts={self.experts!r}, shared={self.shared} and "
                f"residual={self.residual}. Use upcycle_epoch=0, or experts='modules' alone."
            )


def _feed_forward_like(make_expert: Callable[[], nn.Module], item_shape: tuple[int, ...]) -> Callable[[], nn.Module]:
    """Return what makes one feed-forward network such as `GroupedFeedForward` stacks, in place of a model's expert."""
    shape = output_shape_of("the model's expert", make_expert(), item_shape)
    if len(item_shape) != 1 or shape != item_shape:
        raise ValueError(
            "Grouped experts are feed-forward networks from vectors to vectors of the same size; this model's experts "
            f"take items of shape {item_shape} and return {shape}. Use experts='modules'."
        )
    size = item_shape[0]
    return lambda: nn.Sequential(nn.Linear(size, size), nn.ReLU(), nn.Linear(size, size))
