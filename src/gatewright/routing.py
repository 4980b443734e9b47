"""The records that pass between the four nouns: a list of assignments, or weights, and the sums that losses read."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from types import MappingProxyType
from typing import Self

import torch
from jaxtyping import Bool, Float, Int, Num
from torch import Tensor

from gatewright.internals import in_forward_mode, in_transform, is_capturing, is_exporting
from gatewright.ops import stable_sort
from gatewright.scope import ONE_PROCESS, BatchScope


@dataclass(frozen=True)
class RoutingSums:
    """What losses and metrics need of a batch, as sums over its tokens.

    Every field is additive: the record of two batches is the sum of their records, so a loss over a global batch is one
    all-reduce of sums. Counts are integers and exact; the other sums are of the logits' type, at least float32.

    Args:
        num_tokens: How many tokens were routed.
        tokens_per_expert: Assignments per expert, as the router chose them, before any is dropped; sums of weights
            where a router mixes tokens.
        importance: Sum of weights per expert, ``Importance(X)`` of https://arxiv.org/abs/1701.06538 eq. 6.
        load: Smooth estimate of the assignments per expert, ``Load(X)`` of the same paper, eq. 10; the count itself
            where the router draws no noise.
        probs: Sum of the router's probabilities over all experts, chosen or not.
        router_z: Sum of ``logsumexp(logits) ** 2``, https://arxiv.org/abs/2202.08906 eq. 5.
        entropy: Sum of the entropies of the router's probabilities, in nats.
        dropped: Assignments discarded by a capacity limit or expert dropout.
        group_load: ``Load`` of the upper level where a router chooses groups of experts first; no entry in a flat one.
        group_tokens: Tokens sent to each group; ``load`` is then the lower level's, within each group.
        threshold: Sum of what learned thresholds miss the batch's own by, https://arxiv.org/abs/1701.06538 appendix F.
    """

    num_tokens: Int[Tensor, ""]
    tokens_per_expert: Num[Tensor, " experts"]
    importance: Float[Tensor, " experts"]
    load: Float[Tensor, " experts"]
    probs: Float[Tensor, " experts"]
    router_z: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    dropped: Int[Tensor, ""]
    group_load: Float[Tensor, " groups"]
    group_tokens: Int[Tensor, " groups"]
    threshold: Float[Tensor, ""]

    def __add__(self, other: Self) -> Self:
        """Add the sums of two batches."""
        return type(self)(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))

    def __getattr__(self, name: str) -> Tensor:
        """Compute a sum that nobody has read so far; see `when_read`."""
        if name not in _SUMS or "_sources" not in self.__dict__:
            raise AttributeError(f"RoutingSums has no {name}.")
        sources = self.__dict__["_sources"]
        with torch.set_grad_enabled(sources.grad_enabled):
            value = _SUMS[name](sources)
        object.__setattr__(self, name, value)
        return value

    def __getstate__(self) -> dict[str, Tensor]:
        """Compute what is left, so that a copy needs nothing else."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def when_read(cls, sources: "_Sources") -> Self:
        """Make a record that computes each sum when it is first read, since most steps read few of them.

        A program that is traced, transformed or captured holds only what runs now, so there all are computed at once.
        """
        if torch.compiler.is_compiling() or is_exporting() or in_transform() or in_forward_mode() or is_capturing():
            return cls(**{name: compute(sources) for name, compute in _SUMS.items()})
        record = object.__new__(cls)
        object.__setattr__(record, "_sources", sources)
        return record

    def over(self, scope: BatchScope) -> Self:
        """Add up over the processes of a scope, in one reduction."""
        if type(scope).sum is BatchScope.sum:  # One process, which need not compute what it does not read.
            return self
        return type(self)(*scope.sum(*(getattr(self, field.name) for field in fields(self))))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every sum."""
        return type(self)(*(function(getattr(self, field.name)) for field in fields(self)))

    def detach(self) -> Self:
        """Return the same sums without their graph."""
        if "_sources" in self.__dict__:
            return type(self).when_read(self.__dict__["_sources"].detach())
        return self.map(Tensor.detach)


@dataclass(frozen=True)
class Routing:
    """Who goes where, and how much it counts: a flat list of (token, expert, weight).

    Assignments stand in order of arrival: where tokens choose experts, the first choices of all tokens, then their
    second choices, and so on. The length depends on the router and the number of tokens alone, never on their values:
    an assignment that is dropped, or was not made, stays in the list with ``expert_index = num_experts`` and weight 0.

    Args:
        token_index: Which token, in ``[0, num_tokens)``.
        expert_index: Which expert, in ``[0, num_experts]``; the last value marks a dropped one.
        weight: What multiplies the expert's output for this token; at least float32.
        sums: The batch's additive statistics.
        logits: The router's logits of every token, without noise; None where a router of your own leaves them out.
        probs: Its probabilities over all experts; each row sums to 1. None as above.
        top_k: Experts per token where every token has the same number and none is dropped, so that each of the flat
            lists can be viewed as ``(top_k, tokens)``; None for any other list.
    """

    token_index: Int[Tensor, " assignments"]
    expert_index: Int[Tensor, " assignments"]
    weight: Float[Tensor, " assignments"]
    sums: RoutingSums
    logits: Float[Tensor, "tokens experts"] | None = None
    probs: Float[Tensor, "tokens experts"] | None = None
    top_k: int | None = None

    @property
    def num_experts(self) -> int:
        """How many experts the router chose among."""
        return self.sums.tokens_per_expert.shape[0]

    def detach(self) -> Self:
        """Return the same routing without its graph."""
        logits, probs = (None if tensor is None else tensor.detach() for tensor in (self.logits, self.probs))
        return replace(self, weight=self.weight.detach(), sums=self.sums.detach(), logits=logits, probs=probs)

    def drop(self, dropped_mask: Bool[Tensor, " assignments"]) -> Self:
        """Discard the masked assignments; a token that loses all of them gets zero from the layer."""
        return replace(
            self,
            expert_index=self.expert_index.masked_fill(dropped_mask, self.num_experts),
            weight=self.weight.masked_fill(dropped_mask, 0.0),
            sums=replace(self.sums, dropped=self.sums.dropped + dropped_mask.sum()),
            top_k=None,
        )

    def by_expert(self) -> tuple[Self, Int[Tensor, " assignments"]]:
        """Sort by expert, arrivals in order within each and dropped assignments last; return the order as well."""
        expert_index, order = stable_sort(self.expert_index)
        token_index, weight = (values.index_select(0, order) for values in (self.token_index, self.weight))
        grouped = replace(self, token_index=token_index, expert_index=expert_index, weight=weight, top_k=None)
        return grouped, order


@dataclass(frozen=True)
class SoftRouting:
    """The dense twin of `Routing`: every token goes to every slot of every expert, by a share of it.

    Args:
        dispatch: What a token is multiplied by in the mean that fills a slot; at least float32. Over the tokens of a
            group it sums to 1. Where a group is spread over processes, this is one process's part of it, and the
            slots are filled by the sum over processes.
        combine: What multiplies a slot's output for a token; over all slots it sums to 1.
        sums: The batch's additive statistics, where a token counts for each expert by its weight.
        scope: Over which the slots are filled: where a group is spread over processes, these.
        logits: Of every token, over the slots of all experts.
    """

    dispatch: Float[Tensor, "groups group_tokens experts slots"]
    combine: Float[Tensor, "groups group_tokens experts slots"]
    sums: RoutingSums
    scope: BatchScope
    logits: Float[Tensor, "tokens all_slots"]

    @property
    def num_experts(self) -> int:
        """How many experts there are."""
        return self.combine.shape[2]

    @property
    def weight(self) -> Float[Tensor, "tokens experts"]:
        """How much of each token's output comes from each expert; each row sums to 1."""
        return self.combine.sum(-1).flatten(0, 1)

    def detach(self) -> Self:
        """Return the same routing without its graph."""
        dispatch, combine, logits = (tensor.detach() for tensor in (self.dispatch, self.combine, self.logits))
        return replace(self, dispatch=dispatch, combine=combine, logits=logits, sums=self.sums.detach())


def soft_routing(
    logits: Float[Tensor, "tokens slots"],
    dispatch: Float[Tensor, "groups group_tokens experts expert_slots"],
    combine: Float[Tensor, "groups group_tokens experts expert_slots"],
    scope: BatchScope = ONE_PROCESS,
) -> SoftRouting:
    """Make the record of a router that mixes tokens; tokens per expert, load and importance are sums of weights.

    Args:
        logits: Over the slots of all experts.
        dispatch: As in `SoftRouting`.
        combine: As in `SoftRouting`.
        scope: As in `SoftRouting`.
    """
    weight = combine.sum(-1).flatten(0, 1)
    per_expert, count = weight.sum(0), partial(torch.zeros, dtype=torch.int64, device=logits.device)
    sums = RoutingSums(
        num_tokens=count(()) + logits.shape[0],
        tokens_per_expert=per_expert,
        importance=per_expert,
        load=per_expert,
        probs=per_expert,
        router_z=logits.logsumexp(-1).square().sum(),
        entropy=torch.special.entr(weight).sum(),
        dropped=count(()),
        group_load=logits.new_zeros(0),
        group_tokens=count(0),
        threshold=logits.new_zeros(()),
    )
    return SoftRouting(dispatch, combine, sums, scope, logits)


def top_k_routing(
    expert_index: Int[Tensor, "tokens top_k"],
    weight: Float[Tensor, "tokens top_k"],
    logits: Float[Tensor, "tokens experts"],
    probs: Float[Tensor, "tokens experts"],
    load: Float[Tensor, "tokens experts"] | None = None,
) -> Routing:
    """Make the record of a router that chooses the same number of experts for every token.

    Args:
        expert_index: Chosen experts, best first.
        weight: Their weights.
        logits: The router's logits without noise.
        probs: Probabilities over all experts that the balance loss and the entropy read; each row sums to 1.
        load: Probability that a token is sent to each expert under fresh noise; by default what was chosen.
    """
    num_tokens, top_k = expert_index.shape
    token_index = torch.arange(num_tokens, device=logits.device).repeat(top_k)
    routing = flat_routing(token_index, expert_index.t().reshape(-1), weight.t().reshape(-1), logits, probs, load)
    return replace(routing, top_k=top_k)


def flat_routing(
    token_index: Int[Tensor, " assignments"],
    expert_index: Int[Tensor, " assignments"],
    weight: Float[Tensor, " assignments"],
    logits: Float[Tensor, "tokens experts"],
    probs: Float[Tensor, "tokens experts"],
    load: Float[Tensor, "tokens experts"] | None = None,
) -> Routing:
    """Make the record of any list of assignments; those not made have ``expert_index = num_experts`` and weight 0.

    Args:
        token_index: Which token.
        expert_index: Which expert.
        weight: What its output is multiplied by.
        logits: As in `top_k_routing`.
        probs: As in `top_k_routing`.
        load: As in `top_k_routing`.
    """
    counts = _per_expert(torch.ones_like(expert_index), expert_index, logits.shape[1])
    sources = _Sources(expert_index, weight, logits, probs, load, counts, torch.is_grad_enabled())
    sums = RoutingSums.when_read(sources)
    return Routing(token_index, expert_index, weight, sums, logits, probs)


@dataclass(frozen=True)
class _Sources:
    """What the sums of a batch are computed from."""

    expert_index: Tensor
    weight: Tensor
    logits: Tensor
    probs: Tensor
    load: Tensor | None
    tokens_per_expert: Tensor
    grad_enabled: bool

    def detach(self) -> Self:
        """Return the same without their graph."""
        weight, logits, probs = (tensor.detach() for tensor in (self.weight, self.logits, self.probs))
        load = None if self.load is None else self.load.detach()
        return replace(self, weight=weight, logits=logits, probs=probs, load=load)


def _per_expert(values: Tensor, expert_index: Tensor, num_experts: int) -> Num[Tensor, " experts"]:
    """Add up values by expert, without those of assignments that were not made."""
    sums = values.new_zeros(num_experts + 1).index_add(0, expert_index, values)
    # A view would confuse torch.compile where its detached twin is kept as well.
    return sums[:-1].clone() if torch.compiler.is_compiling() else sums[:-1]


def _load(of: _Sources) -> Float[Tensor, " experts"]:
    return of.tokens_per_expert.to(of.logits.dtype) if of.load is None else of.load.sum(0)


def _count(of: _Sources, *shape: int, value: int = 0) -> Int[Tensor, "*shape"]:
    return torch.full(shape, value, dtype=torch.int64, device=of.logits.device)


_SUMS: Mapping[str, Callable[[_Sources], Tensor]] = MappingProxyType(
    {
        "num_tokens": lambda of: _count(of, value=of.logits.shape[0]),
        "tokens_per_expert": lambda of: of.tokens_per_expert,
        "importance": lambda of: _per_expert(of.weight, of.expert_index, of.logits.shape[1]),
        "load": _load,
        "probs": lambda of: of.probs.sum(0),
        "router_z": lambda of: of.logits.logsumexp(-1).square().sum(),
        "entropy": lambda of: torch.special.entr(of.probs).sum(),
        "dropped": _count,
        "group_load": lambda of: of.logits.new_zeros(0),
        "group_tokens": lambda of: _count(of, 0),
        "threshold": lambda of: of.logits.new_zeros(()),
    }
)
"""How each sum is computed."""
