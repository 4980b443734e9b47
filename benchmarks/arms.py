"""Gatewright's arms and the baselines: each builds a module of a case's weights, from tokens to the layer's output."""

from collections.abc import Callable, Iterable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case, Weights, make_items
from gatewright import GroupedFeedForward, MoE, TopK, moe_layers
from gatewright.kernels.plain import activate

Build = Callable[[Case, Weights], nn.Module]
COPIES = 3e9
"""The most bytes that an arm may take for copied matrices or one-hot masks."""


class LeftOutError(Exception):
    """Says why an arm has no figure for a case."""


def longest_group(case: Case, weights: Weights) -> int:
    """Return how many of the case's tokens the most wanted expert gets."""
    index = (make_items(case, weights.gate) @ weights.gate).topk(case.top_k).indices
    return int(torch.bincount(index.flatten(), minlength=case.experts).max())


def refuse_copies(what: str, numbers: int, weights: Weights) -> None:
    """Leave an arm out where what it makes of one batch would not fit into memory."""
    size = numbers * weights.up.element_size()
    if size > COPIES:
        raise LeftOutError(f"its {what} would take {size / 1e9:.0f} GB")


class FeedForward(nn.Module):
    """One expert, or a stack of experts on groups of one length."""

    def __init__(self, up: Tensor, down: Tensor, activation: str) -> None:
        super().__init__()
        self.up, self.down, self.activation = nn.Parameter(up.clone()), nn.Parameter(down.clone()), activation

    def forward(self, x: Tensor) -> Tensor:
        """Return one output per row."""
        return activate(x @ self.up, self.activation) @ self.down


def experts_of(case: Case, weights: Weights) -> list[nn.Module]:
    """Make every expert as a module of its own."""
    return [FeedForward(up, down, case.activation) for up, down in zip(weights.up, weights.down, strict=True)]


def dense(case: Case, weights: Weights) -> nn.Module:
    """Make a feed-forward of as many active operations, which no router precedes."""
    halves = weights.up[: case.top_k].chunk(2 if case.activation == "swiglu" else 1, -1)
    up = torch.cat([half.transpose(0, 1).flatten(1) for half in halves], -1)
    return FeedForward(up, weights.down[: case.top_k].flatten(0, 1), case.activation)


class Routed(nn.Module):
    """What the baselines share: a gate in the items' dtype, softmax in at least float32, and the k largest."""

    def __init__(self, gate: Tensor, top_k: int) -> None:
        super().__init__()
        self.top_k, self.gate = top_k, nn.Parameter(gate.t().contiguous())

    def logits(self, x: Tensor) -> Tensor:
        """Return ``(tokens, experts)``."""
        return F.linear(x, self.gate)

    def forward(self, x: Tensor) -> Tensor:
        """Route, and mix what the experts return."""
        logits = self.logits(x)
        top = logits.softmax(-1, dtype=torch.promote_types(x.dtype, torch.float32)).topk(self.top_k)
        weight = top.values / top.values.sum(-1, keepdim=True) if self.top_k > 1 else top.values
        return self.mix(x, top.indices, weight.to(x.dtype))

    def mix(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Return each token's weighted sum of its experts' outputs."""
        raise NotImplementedError


class ModuleLoop(Routed):
    """A loop over the experts; in float64 it is also what every arm's numbers are compared with."""

    def __init__(self, gate: Tensor, top_k: int, experts: Iterable[nn.Module]) -> None:
        super().__init__(gate, top_k)
        self.experts = nn.ModuleList(experts)

    def mix(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Call each expert that has tokens on its tokens, and add what it returns."""
        output = torch.zeros_like(x)
        for number, expert in enumerate(self.experts):
            token, choice = torch.where(index == number)
            if len(token):
                output.index_add_(0, token, expert(x[token]) * weight[token, choice, None])
        return output


class Stacked(Routed):
    """Experts as two stacks of matrices."""

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__(weights.gate, case.top_k)
        self.case, self.experts = case, FeedForward(weights.up, weights.down, case.activation)

    def slots(self, index: Tensor) -> tuple[Tensor, int]:
        """Return each assignment's place in its expert's group, and the length of the longest group."""
        expert = index.flatten()
        order = expert.argsort(stable=True)
        counts = torch.bincount(expert, minlength=self.case.experts)
        place = torch.arange(len(order), device=index.device) - (counts.cumsum(0) - counts)[expert[order]]
        return torch.empty_like(place).scatter_(0, order, place), int(counts.max())


class SortAndProduct(Stacked):
    """A plain sort, `F.grouped_mm`, and a sum per token."""

    def mix(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Sort, multiply twice, and sum."""
        order = index.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        counts = torch.bincount(index.flatten(), minlength=self.case.experts)
        ends = counts.cumsum(0, dtype=torch.int32)
        hidden = activate(F.grouped_mm(x[order // self.top_k], self.experts.up, offs=ends), self.case.activation)
        rows = F.grouped_mm(hidden, self.experts.down, offs=ends)
        return (rows[inverse].unflatten(0, index.shape) * weight[..., None]).sum(1)


class Padded(Stacked):
    """Batched products over groups padded to the longest."""

    def mix(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Write rows into padded groups, multiply twice, and read them back."""
        place, longest = self.slots(index)
        slot = index.flatten() * longest + place
        token = torch.arange(len(x), device=x.device).repeat_interleave(self.top_k)
        rows = x.new_zeros(self.case.experts * longest, x.shape[1]).index_copy(0, slot, x[token])
        rows = self.experts(rows.unflatten(0, (-1, longest))).flatten(0, 1)
        return (rows[slot].unflatten(0, index.shape) * weight[..., None]).sum(1)


class OneHot(Stacked):
    """Dispatch and combine as products with one-hot masks: https://arxiv.org/abs/2006.16668."""

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__(case, weights)
        refuse_copies("one-hot masks", 2 * case.tokens * case.experts * longest_group(case, weights), weights)

    def mix(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Multiply by the mask, by the experts, and by the weighted mask."""
        place, longest = self.slots(index)
        shape = (len(x), self.case.experts * longest)
        slot = index * longest + place.view_as(index)
        combine = x.new_zeros(shape).scatter(1, slot, weight).unflatten(1, (-1, longest))
        rows = torch.einsum("tec,td->ecd", (combine != 0).to(x.dtype), x)
        return torch.einsum("tec,ecd->td", combine, self.experts(rows))


def go_by(model: nn.Module, way: str | None) -> None:
    """Make the experts of a model's mixtures go by rows, or by a back-end."""
    for _, layer in moe_layers(model):
        if way == "rows":
            layer.experts.register_forward_hook(lambda *_: None)
        else:
            layer.experts.backend = way


def gatewright(case: Case, weights: Weights, backend: str | None = None, rows: bool = False) -> nn.Module:
    """Our layer by a back-end's name; `rows` makes it dispatch rows instead, as it does where nothing is fused."""
    experts = GroupedFeedForward(case.experts, case.dim, case.ffn, activation=case.activation, backend=backend)
    router = TopK(case.dim, case.experts, case.top_k, score_after_top_k=case.top_k > 1)
    layer = MoE(router, experts, losses={}).to(weights.gate)
    with torch.no_grad():
        layer.router.gate.weight.copy_(weights.gate.t())
        experts.weight_in.copy_(weights.up)
        experts.weight_out.copy_(weights.down)
    if rows:
        go_by(layer, "rows")
    return layer


def module_loop(case: Case, weights: Weights) -> ModuleLoop:
    """Make a loop over experts that are modules."""
    return ModuleLoop(weights.gate, case.top_k, experts_of(case, weights))


OURS: dict[str, Build] = {
    "gatewright": gatewright,
    "gatewright, torch": partial(gatewright, backend="torch"),
    "gatewright, rows": partial(gatewright, rows=True),
}
"""Our layer as it is, by the back-end of plain torch, and by rows."""
BASELINES: dict[str, Build] = {
    "module loop": module_loop,
    "sort and product": SortAndProduct,
    "padded product": Padded,
    "one-hot product": OneHot,
}
