"""The arms: each builds a module of a case's weights, which maps tokens to the layer's output."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.cases import Case, Weights
from gatewright import GroupedFeedForward, MoE, TopK


class Dense(nn.Module):
    """A feed-forward of as many active operations, which no router precedes."""

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__()
        used = weights.up[: case.top_k]
        gate, up = (half.transpose(0, 1).flatten(1).t() for half in used.chunk(2, -1))
        self.up = nn.Parameter(torch.cat([gate, up]).contiguous())
        self.down = nn.Parameter(weights.down[: case.top_k].flatten(0, 1).t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Return one output per token."""
        gate, up = F.linear(x, self.up).chunk(2, -1)
        return F.linear(F.silu(gate) * up, self.down)


class Routed(nn.Module):
    """What the peers share: a gate in bfloat16, softmax in float32, and the k largest."""

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__()
        self.case = case
        self.gate = nn.Parameter(weights.gate.t().contiguous())

    def forward(self, x: Tensor) -> Tensor:
        """Route, and mix what the experts return."""
        top = F.linear(x, self.gate).softmax(-1, dtype=torch.float32).topk(self.case.top_k)
        return self.mix(x, top.indices, top.values)

    def mix(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Return each token's weighted sum of its experts' outputs."""
        raise NotImplementedError


class SortAndProduct(Routed):
    """A plain sort, `F.grouped_mm`, and a sum per token."""

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__(case, weights)
        self.up, self.down = nn.Parameter(weights.up.clone()), nn.Parameter(weights.down.clone())

    def mix(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Sort, multiply twice, and sum."""
        order = index.flatten().argsort(stable=True)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=x.device))
        counts = torch.histc(index.int(), self.case.experts, 0, self.case.experts - 1)
        ends = counts.cumsum(0, dtype=torch.int32)
        gate, up = F.grouped_mm(x[order // self.case.top_k], self.up, offs=ends).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, self.down, offs=ends)
        return (rows[inverse].unflatten(0, index.shape) * weight[..., None].to(x.dtype)).sum(1)


class Transformers(Routed):
    """The grouped_mm experts of transformers 5."""

    num_experts: int
    has_gate, has_bias, is_transposed, is_concatenated = True, False, False, True

    def __init__(self, case: Case, weights: Weights) -> None:
        super().__init__(case, weights)
        from transformers.integrations.moe import grouped_mm_experts_forward

        self.experts_forward: Callable[..., Tensor] = grouped_mm_experts_forward
        self.num_experts, self.act_fn, self.config = case.experts, F.silu, None
        self.gate_up_proj = nn.Parameter(weights.up.transpose(1, 2).contiguous())
        self.down_proj = nn.Parameter(weights.down.transpose(1, 2).contiguous())

    def _apply_gate(self, hidden: Tensor) -> Tensor:
        gate, up = hidden.chunk(2, -1)
        return F.silu(gate) * up

    def mix(self, x: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        """Call the library's function."""
        return self.experts_forward(self, x, index, weight)


def gatewright(case: Case, weights: Weights, backend: str | None, rows: bool = False) -> nn.Module:
    """Our layer by a back-end's name; `rows` makes it dispatch rows instead, as it does where nothing is fused."""
    experts = GroupedFeedForward(case.experts, case.dim, case.ffn, activation="swiglu", backend=backend)
    layer = MoE(TopK(case.dim, case.experts, case.top_k), experts, losses={}).cuda().bfloat16()
    with torch.no_grad():
        layer.router.gate.weight.copy_(weights.gate.t())
        experts.weight_in.copy_(weights.up)
        experts.weight_out.copy_(weights.down)
    if rows:
        experts.register_forward_hook(lambda *_: None)
    return layer


ARMS: dict[str, Callable[[Case, Weights], Any]] = {
    "dense": Dense,
    "gatewright triton": partial(gatewright, backend="triton"),
    "gatewright torch": partial(gatewright, backend="torch"),
    "gatewright rows": partial(gatewright, backend=None, rows=True),
    "sort and product": SortAndProduct,
    "transformers": Transformers,
}
"""Every arm by name; the first is of equal active operations, and no mixture."""
