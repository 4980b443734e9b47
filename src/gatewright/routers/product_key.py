"""Product keys: an expert's logit is the sum of its row's and its column's, so that thousands cost little."""

import math
import warnings
from types import MappingProxyType

import torch
from jaxtyping import Float
from torch import Tensor

from gatewright.routers.base import TASK_GRADIENT_HINT, Router
from gatewright.routers.gate import EvenGate, gate_logits
from gatewright.routing import Routing, entropies, real_only, summed_routing
from gatewright.scope import ONE_PROCESS, BatchScope, Mask


class ProductKey(Router):
    """Put experts into rows and columns, and send each token to the k of the largest sums of two logits.

    https://arxiv.org/abs/2407.04153 section 2.2, after https://arxiv.org/abs/1907.05242 section 3.1. With ``C``
    columns, expert ``i * C + j`` has the logit ``r_i + c_j``. The k largest are among the k best rows times the k best
    columns. Therefore a token costs a logit per row and column in place of one per expert, and no tensor of ``(tokens,
    experts)`` is ever made. The papers give one half of a query to the rows and the other to the columns; here both see
    all features, as gates do. Routes, sums and losses are those of `TopK` with the summed logits; `Routing.logits` and
    `Routing.probs` are left out.

    Args:
        dim: Size of the features a token is routed by.
        num_experts: Number of experts.
        top_k: Experts per token.
        num_rows: Number of rows, which divides num_experts; by default its divisor next below the square root. With one
            row this is `TopK`.
        score_after_top_k: Whether the softmax that gives the weights is taken over the chosen logits alone, as in the
            paper, or over all experts.
        gate_bias: Whether the gate adds a bias, zero at first.

    Raises:
        ValueError: If top_k is above num_experts, a size is below 1, or num_rows does not divide num_experts.
    """

    default_losses = MappingProxyType({"load_balance": 0.01})

    def __init__(
        self,
        dim: int,
        num_experts: int,
        top_k: int = 2,
        *,
        num_rows: int | None = None,
        score_after_top_k: bool = True,
        gate_bias: bool = False,
    ) -> None:
        super().__init__(dim, num_experts, top_k)
        if num_rows is None:
            num_rows = next(rows for rows in range(math.isqrt(num_experts), 0, -1) if num_experts % rows == 0)
        if num_rows < 1 or num_experts % num_rows:
            raise ValueError(
                f"num_rows must divide num_experts; got {num_rows} rows of {num_experts} experts. Change one of them, "
                "or leave num_rows out."
            )
        if top_k == 1 < num_experts and score_after_top_k:
            warnings.warn(TASK_GRADIENT_HINT.format(router="ProductKey"), stacklevel=2)
        self.num_rows, self.num_columns = num_rows, num_experts // num_rows
        self.score_after_top_k = score_after_top_k
        self.has_rows = num_rows > 1  # The logit of a single row would change nothing.
        self.gate = EvenGate(dim, self.num_columns + num_rows * self.has_rows, bias=gate_bias)

    def forward(
        self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS, mask: Mask = None
    ) -> Routing:
        """Route every token."""
        logits = gate_logits(features, self.gate)
        columns, rows = logits[:, : self.num_columns], logits[:, self.num_columns :]
        if not self.has_rows:
            rows = torch.zeros_like(columns[:, :1])
        best_rows, best_columns = (each.topk(min(self.top_k, each.shape[1])) for each in (rows, columns))
        candidates = best_rows.values[:, :, None] + best_columns.values[:, None]
        experts = best_rows.indices[:, :, None] * self.num_columns + best_columns.indices[:, None]
        best = candidates.flatten(1).topk(self.top_k).indices
        expert_index = scope.chosen(experts.flatten(1).gather(-1, best))
        row_index, column_index = expert_index // self.num_columns, expert_index % self.num_columns
        chosen = rows.gather(-1, row_index) + columns.gather(-1, column_index)
        normalizers = rows.logsumexp(-1) + columns.logsumexp(-1)
        weight = chosen.softmax(-1) if self.score_after_top_k else (chosen - normalizers[:, None]).exp()
        row_probs, column_probs = rows.softmax(-1), columns.softmax(-1)
        return summed_routing(
            expert_index,
            weight,
            mask,
            probs=_sum_of_products(real_only(row_probs, mask), column_probs),
            router_z=real_only(normalizers.square(), mask).sum(),
            entropy=real_only(entropies(row_probs).sum(-1) + entropies(column_probs).sum(-1), mask).sum(),
        )

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return f"{super().extra_repr()}, num_rows={self.num_rows}"


def _sum_of_products(
    row_probs: Float[Tensor, "tokens rows"], column_probs: Float[Tensor, "tokens columns"]
) -> Float[Tensor, " experts"]:
    with torch.autocast(row_probs.device.type, enabled=False):
        return (row_probs.t() @ column_probs).flatten()
