"""Equal feed-forward experts with stacked weights: two grouped GEMMs instead of a call per expert."""

from typing import Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewright.experts.base import Experts, Shape
from gatewright.ops import expert_of_rows, grouped_mm

Activation = Literal["gelu", "relu", "swiglu"]


class GroupedFeedForward(Experts):
    """``activation(x W_in + b_in) W_out + b_out`` per expert; SwiGLU is ``(silu(x W_gate) * (x W_up)) W_out``.

    Each expert is initialised as a pair of `nn.Linear` would be. SwiGLU: https://arxiv.org/abs/2002.05202 eq. 6.

    Args:
        num_experts: How many experts.
        dim: Size of an item, in and out.
        ffn: Size of the hidden layer.
        activation: ``"gelu"`` (exact), ``"relu"`` or ``"swiglu"``.
        bias: Whether both layers add a bias.
        dropout: In training, the probability of zeroing each hidden activation: the expert dropout of
            https://arxiv.org/abs/2101.03961 section 2.4, 0.4 there in fine-tuning. It draws from torch's generator.

    Raises:
        ValueError: If a size is below 1, the activation is unknown or dropout is outside ``[0, 1)``.
    """

    stacked = True

    def __init__(
        self,
        num_experts: int,
        dim: int,
        ffn: int,
        *,
        activation: Activation = "gelu",
        bias: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if min(num_experts, dim, ffn) < 1:
            raise ValueError(f"num_experts, dim and ffn are at least 1; got {num_experts}, {dim} and {ffn}.")
        if activation not in ("gelu", "relu", "swiglu"):
            raise ValueError(f"activation is 'gelu', 'relu' or 'swiglu'; got {activation!r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is at least 0 and below 1; got {dropout}. Switch fine-tunes with 0.4.")
        self.num_experts, self.dim, self.ffn, self.activation = num_experts, dim, ffn, activation
        self.dropout = dropout
        hidden = 2 * ffn if activation == "swiglu" else ffn
        self.weight_in = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.weight_out = nn.Parameter(torch.empty(num_experts, ffn, dim))
        self.bias_in = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.bias_out = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as `nn.Linear` does: uniform within ``1 / sqrt(inputs)``."""
        for parameter, inputs in (
            (self.weight_in, self.dim),
            (self.bias_in, self.dim),
            (self.weight_out, self.ffn),
            (self.bias_out, self.ffn),
        ):
            if parameter is not None:
                nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

    def keep(self, start: int, stop: int) -> None:
        """Keep a run of the experts: their part of every stacked parameter."""
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(parameter.detach()[start:stop].clone(), parameter.requires_grad))
        self.num_experts = stop - start

    def output_shape(self, item_shape: Shape) -> Shape:
        """Return ``(dim,)``, the only shape of items taken."""
        if item_shape != (self.dim,):
            raise ValueError(
                f"GroupedFeedForward(dim={self.dim}) takes items of shape ({self.dim},); got {item_shape}."
            )
        return item_shape

    def forward(
        self, rows: Float[Tensor, "assignments dim"], tokens_per_expert: Int[Tensor, " experts"]
    ) -> Float[Tensor, "assignments dim"]:
        """Run all experts in two grouped GEMMs.

        Raises:
            ValueError: If rows and parameters are of different types, outside of autocast.
        """
        hidden = self._activate(_linear(rows, self.weight_in, self.bias_in, tokens_per_expert))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return _linear(hidden, self.weight_out, self.bias_out, tokens_per_expert)

    def _activate(self, hidden: Tensor) -> Tensor:
        if self.activation == "swiglu":
            gate, up = hidden.chunk(2, dim=-1)
            return F.silu(gate) * up
        return F.gelu(hidden) if self.activation == "gelu" else F.relu(hidden)

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, ffn={self.ffn}, activation={self.activation}, "
            f"bias={self.bias_in is not None}, dropout={self.dropout}"
        )


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, tokens_per_expert: Tensor) -> Tensor:
    """Apply each expert's linear layer to its rows, in autocast's dtype where it is on, as `F.linear` would."""
    if torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(rows.device.type)
        rows, weight, bias = rows.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if rows.dtype != weight.dtype:
        raise ValueError(
            f"GroupedFeedForward has parameters of {weight.dtype} and got items of {rows.dtype}. Convert either, with "
            ".to(dtype), or run under torch.autocast."
        )
    product = grouped_mm(rows, weight, tokens_per_expert)
    if bias is None:
        return product
    expert = expert_of_rows(tokens_per_expert.cumsum(0), rows.shape[0])
    return product + F.pad(bias, (0, 0, 0, 1)).index_select(0, expert)
