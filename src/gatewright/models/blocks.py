"""Blocks of a transformer, whose feed-forward layers are dense or mixtures of experts."""

from dataclasses import replace
from functools import partial
from typing import Any, Literal, Self, cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int, Num
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from gatewright.experts import GroupedFeedForward
from gatewright.models.mixture import CHOOSABLE_ROUTERS, MixtureConfig
from gatewright.models.options import check_options
from gatewright.names import known
from gatewright.routers import Biased, ExpertDropout, Hashed, Router, TokenGate, TopK
from gatewright.settings import settings

ROTARY_BASE = 10_000.0

KEYED_ROUTERS = ("hashed", "gated-hash")
"""Routers that choose by the tokens themselves, by name."""

TOKEN_GATED = (TopK, Biased)
"""Routers whose one gate may be a `TokenGate`."""


@settings("model")
class BlocksConfig(MixtureConfig):
    """Pre-norm transformer blocks in which every feed-forward layer is a mixture, or with one expert is dense.

    An expert's hidden layer is ``ffn / top_k`` wide, so the mixture does the same arithmetic per token as its dense
    twin, the gate apart. With an `upcycle_epoch` it is ``ffn`` wide, as wide as the dense layer that it is a copy of.

    Args:
        experts: The kind of experts, as in any mixture; with an `upcycle_epoch`, ``"grouped"`` ones are modules, which
            can be copied.
        router: The router, as in any mixture; or ``"hashed"``, which sends every token to the experts of its own key,
            with equal weights; or ``"gated-hash"``, which weighs these experts by a learned gate.
        hashed_layers: Number of blocks, the first ones, that have the router ``"gated-hash"`` in place of `router`, as
            the first layers of DeepSeek-V4 do; it has no options and no losses.
        token_gate: Whether a router that learns its choice has, beside the logits of a token's state, learned ones of
            the token's key (`TokenGate`).
        hash_start: Logit that these begin with for the experts that ``"hashed"`` would choose; 0 favours none.
        num_layers: Blocks of attention and feed-forward.
        dim: Width of the residual stream.
        num_heads: Attention heads; they divide `dim`.
        ffn: Hidden units that work on a token in each feed-forward layer; None takes four times `dim`.
    """

    router: str = "top-k"
    experts: Literal["modules", "grouped", "merged"] = "grouped"
    num_layers: PositiveInt = 4
    dim: PositiveInt = 192
    num_heads: PositiveInt = 6
    ffn: PositiveInt | None = None
    hashed_layers: NonNegativeInt = 0
    token_gate: bool = False
    hash_start: NonNegativeFloat = 0.0

    def __post_init__(self) -> None:
        if self.num_experts > 1:
            self._check_router()
        if self.dim % (2 * self.num_heads):
            raise ValueError(
                f"`model.dim` is a multiple of twice `model.num_heads`; got {self.dim} and {self.num_heads}."
            )
        if self.hashed_layers > self.num_layers:
            raise ValueError(
                f"`model.hashed_layers` is at most `model.num_layers`; got {self.hashed_layers} and {self.num_layers}."
            )
        if self.token_gate and self.num_experts > 1 and CHOOSABLE_ROUTERS.get(self.router) not in TOKEN_GATED:
            raise ValueError(
                "A token gate takes the place of the one gate of the routers top-k and biased; got "
                f"token_gate=True and router={self.router!r}. Use one of these, or token_gate=False."
            )
        if self.num_experts > 1 and self.hidden % self.top_k:
            raise ValueError(
                f"`model.top_k` divides `model.ffn`, so that {self.top_k} experts together are as large as the dense "
                f"layer; got {self.top_k} and {self.hidden}."
            )

    def _check_router(self) -> None:
        known(self.router, (*CHOOSABLE_ROUTERS, *KEYED_ROUTERS), "router of a transformer")

    @property
    def hidden(self) -> int:
        """Hidden units of the dense feed-forward layer."""
        return 4 * self.dim if self.ffn is None else self.ffn

    def with_experts(self, num_experts: int, top_k: int | None = None, **changes: Any) -> Self:
        """Return the settings with other experts, whose hidden layers are as wide as these are now."""
        top_k = self.top_k if top_k is None else top_k
        width = self.hidden if self.upcycle_epoch else self.hidden // self.top_k
        ffn = width if num_experts == 1 or self.upcycle_epoch else width * top_k
        return super().with_experts(num_experts, top_k, ffn=self.ffn if ffn == self.hidden else ffn, **changes)

    @property
    def keyed(self) -> bool:
        """Whether the routers look at tokens themselves."""
        return self.num_experts > 1 and (self.token_gate or self.router in KEYED_ROUTERS)

    def build_router(self, dim: int) -> Router:
        """Make the router for features of a size, or the one that hashes tokens."""
        if self.router not in KEYED_ROUTERS:
            router = super().build_router(dim + self.token_gate)
            assert isinstance(router, Router)
            return router
        given = ("dim", "num_experts", "top_k", "gate_dim")
        check_options(Hashed, self.router_options, f"the router {self.router}", given=given)
        gate_dim = dim if self.router == "gated-hash" else 0
        options = cast(dict[str, Any], self.router_options)
        router = Hashed(1, self.num_experts, self.top_k, gate_dim=gate_dim, **options)
        return ExpertDropout(router, self.expert_dropout) if self.expert_dropout else router

    def of_block(self, place: int) -> Self:
        """Return the settings of the block at a place."""
        if place >= self.hashed_layers:
            return self
        return replace(self, router="gated-hash", router_options={}, losses=None, token_gate=False)

    def build_feed_forward(self, num_keys: int) -> nn.Module:
        """Make one feed-forward layer: a mixture, or the dense one.

        Args:
            num_keys: Number of different keys of tokens, which a gate may know.
        """
        layer = self._build_feed_forward()
        if self.token_gate:
            start = self.hash_start
            for router in (module for module in layer.modules() if isinstance(module, TOKEN_GATED)):
                router.gate = TokenGate(self.dim, self.num_experts, num_keys, top_k=self.top_k, hash_start=start)
        return layer

    def _build_feed_forward(self) -> nn.Module:
        copied = self.num_experts == 1 or self.upcycle_epoch > 0
        hidden = self.hidden if copied else self.hidden // self.top_k
        make_expert = partial(_feed_forward, self.dim, hidden)
        if copied or self.layer != "gatewright" or self.experts != "grouped":
            kind = replace(self, experts="modules") if self.experts == "grouped" else self
            return kind.build_mixture(make_expert, router_dim=self.dim, item_shape=(self.dim,))
        experts = GroupedFeedForward(self.num_experts, self.dim, hidden, backend=self.backend)
        return self.assemble(self.build_router(self.dim), experts, make_expert, (self.dim,))


class Block(nn.Module):
    """Attention and feed-forward, each on normalised inputs and added to the residual stream."""

    def __init__(self, config: BlocksConfig, num_keys: int) -> None:
        super().__init__()
        self.attention_norm, self.ffn_norm = nn.RMSNorm(config.dim), nn.RMSNorm(config.dim)
        self.attention = Attention(config.dim, config.num_heads)
        self.ffn = config.build_feed_forward(num_keys)
        self.keyed, self.key_alone = config.keyed, config.router == "hashed"

    def forward(
        self,
        x: Float[Tensor, "batch time dim"],
        keys: Int[Tensor, "batch time"],
        mask: Bool[Tensor, "batch 1 time time"] | None,
    ) -> Float[Tensor, "batch time dim"]:
        """Return the residual stream behind the block."""
        x = x + self.attention(self.attention_norm(x), mask)
        y = self.ffn_norm(x)
        changed: Tensor = self.ffn(y, self._features(keys, y)) if self.keyed else self.ffn(y)
        return x + changed

    def _features(
        self, keys: Int[Tensor, "batch time"], y: Float[Tensor, "batch time dim"]
    ) -> Num[Tensor, "batch time *features"]:
        """Return the keys, and behind them what a gate looks at, in a type that holds both exactly."""
        if self.key_alone:
            return keys
        return torch.cat([keys[..., None], y.to(torch.promote_types(y.dtype, torch.float32))], dim=-1)


class Attention(nn.Module):
    """Multi-head attention with rotary positions: https://arxiv.org/abs/1706.03762 section 3.2.2."""

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.inputs, self.output = nn.Linear(dim, 3 * dim, bias=False), nn.Linear(dim, dim, bias=False)

    def forward(
        self, x: Float[Tensor, "batch time dim"], mask: Bool[Tensor, "batch 1 time time"] | None
    ) -> Float[Tensor, "batch time dim"]:
        """Mix each token with those that the mask lets it see."""
        turned, (value,) = self.inputs(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).split((2, 1))
        query, key = rotate(turned)
        mixed = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        output: Tensor = self.output(mixed.transpose(1, 2).flatten(2))
        return output


def rotate(x: Float[Tensor, "*heads time channels"]) -> Float[Tensor, "*heads time channels"]:
    """Turn pairs of channels by angles that grow with the position: https://arxiv.org/abs/2104.09864 eq. 34."""
    half = x.shape[-1] // 2
    speed = ROTARY_BASE ** -(torch.arange(half, device=x.device, dtype=torch.float32) / half)
    angle = torch.arange(x.shape[-2], device=x.device, dtype=torch.float32)[:, None] * speed
    cos, sin = angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)


def _feed_forward(dim: int, hidden: int) -> nn.Module:
    return nn.Sequential(nn.Linear(dim, hidden, bias=False), nn.GELU(), nn.Linear(hidden, dim, bias=False))
