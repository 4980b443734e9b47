"""Soft routing: no token is sent anywhere, every slot of every expert gets a weighted mean of all tokens."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from gatewright.reset import reset_parts
from gatewright.routers.gate import Gate, gate_logits
from gatewright.routing import Routing, real_only, top_k_routing
from gatewright.routing_sums import Loss, RoutingSums
from gatewright.scope import ONE_PROCESS, BatchScope, Mask

EPSILON = 1e-6


@dataclass(frozen=True)
class SlotWeights:
    """How the tokens of a group fill the slots of all experts, and how the slots' outputs become tokens again.

    Args:
        dispatch: Weight of a token in the mean that fills a slot; at least float32. Over the tokens of a
            group it sums to 1. Where a group is spread over processes, this is one process's part of it.
        combine: Weight of a slot's output for a token; over all slots it sums to 1.
        scope: The processes over which a slot's mean is taken.
        routing: The same as a list in which every token goes to every expert, by its share of the expert's slots.
    """

    dispatch: Float[Tensor, "groups group_tokens experts slots"]
    combine: Float[Tensor, "groups group_tokens experts slots"]
    scope: BatchScope
    routing: Routing

    def fill(self, items: Float[Tensor, "tokens *item"]) -> Float[Tensor, "all_slots *item"]:
        """Return one row per expert, group and slot, in this order: ``D^T X``."""
        grouped = items.unflatten(0, self.dispatch.shape[:2])
        (rows,) = self.scope.sum(_weigh("gtes,gt...->egs...", self.dispatch, grouped))
        return rows.flatten(0, 2)

    def spread(self, rows: Float[Tensor, "all_slots *out"]) -> Float[Tensor, "tokens *out"]:
        """Add up all slots' outputs for each token, times their weights: ``C Y``."""
        groups, _, experts, slots = self.combine.shape
        by_slot = rows.unflatten(0, (experts, groups, slots))
        return _weigh("gtes,egs...->gt...", self.combine, by_slot).flatten(0, 1)

    def of_slots(self) -> Routing:
        """Return a routing whose tokens are the slots, each of which goes to its own expert with weight 1."""
        groups, _, experts, slots = self.combine.shape
        expert = torch.arange(experts, device=self.combine.device)[:, None].expand(-1, groups * slots).reshape(-1)
        every = torch.arange(expert.shape[0], device=expert.device)
        return Routing(every, expert, torch.ones_like(expert, dtype=self.combine.dtype), self.routing.sums)


class CosineGate(Gate):
    """A gate whose logits are cosines: features, and its rows, are divided by their lengths first."""

    def reset_parameters(self) -> None:
        """Draw rows of length 1 on average."""
        super().reset_parameters()
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, input: Num[Tensor, "*batch dim"]) -> Float[Tensor, "*batch choices"]:  # noqa: A002 - torch's name
        """Return the cosines."""
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(_unit(input.to(dtype)), _unit(self.weight.to(dtype)))


class Soft(nn.Module):
    """Mix the tokens of a group into slots, and the slots' outputs into tokens: https://arxiv.org/abs/2308.00951.

    It is the router of `gatewright.SoftMoE`, and of no other layer: it makes no assignments.

    ``Y = C f(D^T X)``: logits are ``scale X Phi``, with the rows of X and the columns of Phi at length 1; D is their
    softmax over the tokens of a group (eq. 1), C their softmax over all slots (eq. 2). Nothing is random, nothing is
    dropped, and the experts' load needs no loss.

    An item's output depends on the tokens of its group, also in evaluation. It is independent of the rest of the batch
    for ``group_size=n``, where a group is a sequence or the patches of an image (the paper's own use), and for
    ``group_size=1``; not for ``group_size=None``, where the (global) batch is one group, which is the paper's where a
    batch is one sequence.

    Args:
        dim: Size of the features a token is routed by.
        num_experts: Number of experts.
        slots_per_expert: Rows that each expert gets per group; they, not the experts, are what a layer costs.
        group_size: Number of consecutive tokens in a group; None takes the whole (global) batch. At 1 every token goes
            to every expert as it is, weighed by a softmax: a second slot of an expert would be a repetition.

    Raises:
        ValueError: If a size is below 1.
    """

    default_losses: Mapping[str, float] = MappingProxyType({})
    own_losses: Mapping[str, Loss] = MappingProxyType({})
    compares_tokens: bool = True

    def __init__(self, dim: int, num_experts: int, *, slots_per_expert: int = 1, group_size: int | None = None) -> None:
        super().__init__()
        if min(dim, num_experts, slots_per_expert, 1 if group_size is None else group_size) < 1:
            raise ValueError(
                f"Sizes are at least 1; got dim={dim}, num_experts={num_experts}, slots_per_expert={slots_per_expert}, "
                f"group_size={group_size}. For one group of the whole batch use group_size=None."
            )
        self.dim, self.num_experts, self.top_k = dim, num_experts, num_experts
        self.slots_per_expert, self.group_size = slots_per_expert, group_size
        self.gate = CosineGate(dim, num_experts * slots_per_expert, bias=False)
        self.scale = nn.Parameter(torch.ones(1))  # FSDP2 takes no parameter without dimensions.

    def reset_parameters(self) -> None:
        """Draw the gate as construction does, and set the scale to 1."""
        reset_parts(self)
        nn.init.ones_(self.scale)

    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> SlotWeights:
        """Weigh every token for every slot; the same in training and evaluation.

        Raises:
            ValueError: If the number of tokens is not a multiple of group_size.
        """
        cosines, slots = gate_logits(features, self.gate), (self.num_experts, self.slots_per_expert)
        logits = self.scale.to(cosines.dtype) * cosines
        num_groups, group_tokens = self._groups(logits.shape[0])
        # The least number in place of minus infinity, so that a group of none is no NaN.
        real = real_only(logits, mask, torch.finfo(logits.dtype).min)
        if self.group_size is None:
            dispatch = softmax_over_batch(real, scope)
        else:
            scope, dispatch = ONE_PROCESS, real.unflatten(0, (num_groups, group_tokens)).softmax(1).flatten(0, 1)
        shape = (num_groups, group_tokens, *slots)
        dispatch, combine = (real_only(each, mask).reshape(shape) for each in (dispatch, logits.softmax(1)))
        routing = _by_expert(logits.unflatten(1, slots).logsumexp(-1), combine.sum(-1).flatten(0, 1), mask)
        return SlotWeights(dispatch, combine, scope, routing)

    def record(self, sums: RoutingSums) -> None:
        """Take no note: nothing adapts."""

    def end_step(self, scope: BatchScope = ONE_PROCESS) -> None:
        """Adapt nothing."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a scale without dimensions too, as older checkpoints hold it."""
        if isinstance(scale := state_dict.get(f"{prefix}scale"), Tensor) and scale.dim() == 0:
            state_dict[f"{prefix}scale"] = scale.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _groups(self, num_tokens: int) -> tuple[int, int]:
        """Return how many groups there are, and of how many tokens each is."""
        if self.group_size is None:
            return 1, num_tokens
        if num_tokens % self.group_size:
            raise ValueError(
                f"The number of tokens is a multiple of group_size ({self.group_size}); got {num_tokens}. Pass whole "
                "groups, or choose another group_size: 1 for tokens on their own, None for the batch as one group."
            )
        return num_tokens // self.group_size, self.group_size

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, slots_per_expert={self.slots_per_expert}, "
            f"group_size={self.group_size}"
        )


def _by_expert(
    logits: Float[Tensor, "tokens experts"],
    weight: Float[Tensor, "tokens experts"],
    mask: Mask,
) -> Routing:
    """List every token for every expert; a token counts for an expert by its weight."""
    everyone = torch.arange(weight.shape[1], device=weight.device).expand_as(weight)
    routing = top_k_routing(everyone, weight, logits, weight, weight, mask)
    return routing.with_sums(tokens_per_expert=routing.sums.importance)


def softmax_over_batch(logits: Float[Tensor, "tokens slots"], scope: BatchScope) -> Float[Tensor, "tokens slots"]:
    """Softmax over the tokens of the global batch, of which these are a process's part."""
    total = scope.gather(logits.logsumexp(0, keepdim=True)).logsumexp(0)
    return (logits - total).exp()


def _unit(vectors: Float[Tensor, "*vectors dim"]) -> Float[Tensor, "*vectors dim"]:
    """Divide each vector by its length, as algorithm 2 does: a vector of zeros stays one."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / (lengths + EPSILON)


def _weigh(equation: str, weight: Tensor, values: Tensor) -> Tensor:
    """Contract in at least float32, also under autocast, and return the values' own type."""
    dtype = torch.promote_types(weight.dtype, values.dtype)
    with torch.autocast(values.device.type, enabled=False):
        return torch.einsum(equation, weight.to(dtype), values.to(dtype)).to(values.dtype)
