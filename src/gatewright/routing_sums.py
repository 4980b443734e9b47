"""What losses and metrics need of a batch: sums over its tokens, each computed when it is first read."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, Self

import torch
from jaxtyping import Float, Int, Num
from torch import Tensor

from gatewright.internals import holds_what_runs_now
from gatewright.scope import BatchScope

Unread = Mapping[str, tuple[Callable[..., Tensor], tuple[Any, ...]]]
"""By name, what computes a sum and from what."""


@dataclass(frozen=True)
class RoutingSums:
    """What losses and metrics need of a batch, as sums over its tokens.

    Every field is additive: the record of two batches is the sum of their records, so a loss over a global batch is one
    all-reduce of sums. Counts are integers and exact; the other sums are of the logits' type, at least float32.

    Args:
        num_tokens: Number of tokens that were routed.
        tokens_per_expert: Assignments per expert, as the router chose them, before any is dropped; sums of weights
            where a router mixes tokens.
        importance: Sum of weights per expert, ``Importance(X)`` of https://arxiv.org/abs/1701.06538 eq. 6.
        load: Smooth estimate of the assignments per expert, ``Load(X)`` of the same paper, eq. 10; the count itself
            where the router draws no noise.
        probs: Sum of the router's probabilities over all experts, chosen or not.
        router_z: Sum of ``logsumexp(logits) ** 2``, https://arxiv.org/abs/2202.08906 eq. 5.
        entropy: Sum of the entropies of the router's probabilities, in nats.
        dropped: Assignments discarded by a capacity limit or expert dropout.
        extra: Further sums of one router alone, by name, which its own losses read (`Router.own_losses`).
    """

    num_tokens: Int[Tensor, ""]
    tokens_per_expert: Num[Tensor, " experts"]
    importance: Float[Tensor, " experts"]
    load: Float[Tensor, " experts"]
    probs: Float[Tensor, " experts"]
    router_z: Float[Tensor, ""]
    entropy: Float[Tensor, ""]
    dropped: Int[Tensor, ""]
    extra: Mapping[str, Num[Tensor, "*shape"]] = field(default_factory=dict)
    _unread: ClassVar[Unread] = {}  # No mapping proxy, which torch.compile cannot read.

    def __getattr__(self, name: str) -> Tensor:
        """Compute a sum that nobody has read so far; see `when_read`."""
        if name not in self._unread:
            raise AttributeError(f"{type(self).__name__} has no {name}.")
        compute, parts = self._unread[name]
        with torch.enable_grad():
            value: Tensor = compute(*parts)
        object.__setattr__(self, name, value)
        return value

    @classmethod
    def when_read(cls, unread: Unread, **known: Tensor) -> Self:
        """Make a record of which some sums are computed when they are first read, since most steps read few of them.

        A program that is traced, transformed or captured holds what runs now, so there all are computed at once.

        Args:
            unread: What computes each of these sums, and from what.
            known: The other sums.
        """
        if holds_what_runs_now():
            return cls(**known, **{name: compute(*parts) for name, (compute, parts) in unread.items()})  # type: ignore[arg-type]
        record = object.__new__(cls)
        record.__dict__.update(known, extra={}, _unread=unread)
        return record

    def replaced(self, **sums: Tensor | Mapping[str, Tensor]) -> Self:
        """Return the record with other sums in place of some, without reading the rest."""
        if not self._unread:
            return replace(self, **sums)  # type: ignore[arg-type]
        record = copy.copy(self)
        record.__dict__.update(sums)
        return record

    def by_name(self) -> dict[str, Tensor]:
        """Return every sum, the router's own behind those that all routers have."""
        common = {each.name: getattr(self, each.name) for each in fields(self) if each.name != "extra"}
        return {**common, **self.extra}

    def __add__(self, other: Self) -> Self:
        """Add the sums of two batches of one router."""
        others = other.by_name()
        return self._like(value + others[name] for name, value in self.by_name().items())

    def over(self, scope: BatchScope) -> Self:
        """Add up over the processes of a scope, in one reduction; one process leaves its own unread."""
        if type(scope).sum is BatchScope.sum:
            return self
        return self._like(scope.sum(*self.by_name().values()))

    def map(self, function: Callable[[Tensor], Tensor]) -> Self:
        """Apply a function to every sum."""
        return self._like(function(value) for value in self.by_name().values())

    def _like(self, values: Iterable[Tensor]) -> Self:
        """Return the record of other values, in the order of `by_name`."""
        named = dict(zip(self.by_name(), values, strict=True))
        extra = {name: named.pop(name) for name in self.extra}
        return replace(self, **named, extra=extra)

    def detach(self) -> Self:
        """Return the same sums without their graph."""
        if not self._unread:
            return self.map(Tensor.detach)
        detached = copy.copy(self)
        unread = {name: (compute, tuple(map(_detached, parts))) for name, (compute, parts) in self._unread.items()}
        known = {name: value.detach() for name, value in self.__dict__.items() if isinstance(value, Tensor)}
        detached.__dict__.update(known, extra={n: v.detach() for n, v in self.extra.items()}, _unread=unread)
        return detached


Loss = Callable[[RoutingSums], Tensor]
"""An auxiliary loss: a function of a batch's sums, unweighted."""


def _detached(part: Any) -> Any:
    return part.detach() if isinstance(part, Tensor) else part
