"""Equal feed-forward experts with stacked weights: two grouped GEMMs instead of a call per expert."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from gatewright.experts.base import Experts, Shape
from gatewright.internals import in_forward_mode, in_transform, is_exporting
from gatewright.kernels.plain import Activation, activate
from gatewright.names import known
from gatewright.ops import BACKENDS, GradientMemory, expert_of_rows, grouped_mm, pad, routed_feed_forward
from gatewright.routing import Routing


class GroupedFeedForward(Experts):
    """``activation(x W_in + b_in) W_out + b_out`` per expert; SwiGLU is ``(silu(x W_gate) * (x W_up)) W_out``.

    Each expert is initialised as a pair of `nn.Linear` would be. SwiGLU: https://arxiv.org/abs/2002.05202 eq. 6.

    Args:
        num_experts: Number of experts.
        dim: Size of an item, in and out.
        ffn: Size of the hidden layer.
        activation: ``"gelu"`` (exact), ``"relu"`` or ``"swiglu"``.
        bias: Whether both layers add a bias.
        dropout: In training, the probability of zeroing each hidden activation: the expert dropout of
            https://arxiv.org/abs/2101.03961 section 2.4, 0.4 there in fine-tuning. It draws from torch's generator.
        backend: Name of the back-end of the fused way, ``"torch"`` or ``"triton"``; by default the first of
            `gatewright.backends` that takes the items. On a CPU the default also pads groups for batched products where
            these take less time, and ``"torch"`` never does. With biases there is no fused way.

    Raises:
        ValueError: If a size is below 1, the activation is unknown or dropout is outside ``[0, 1)``.
    """

    stacked = True
    is_transposed = True
    """What transformers calls matrices that are stored as ``(inputs, outputs)``; peft's adapters ask for it."""

    def __init__(
        self,
        num_experts: int,
        dim: int,
        ffn: int,
        *,
        activation: Activation = "gelu",
        bias: bool = False,
        dropout: float = 0.0,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        if min(num_experts, dim, ffn) < 1:
            raise ValueError(f"num_experts, dim and ffn are at least 1; got {num_experts}, {dim} and {ffn}.")
        if activation not in ("gelu", "relu", "swiglu"):
            raise ValueError(f"activation is 'gelu', 'relu' or 'swiglu'; got {activation!r}.")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is at least 0 and below 1; got {dropout}. Switch fine-tunes with 0.4.")
        self.num_experts, self.dim, self.ffn, self.activation = num_experts, dim, ffn, activation
        if backend is not None:
            known(backend, BACKENDS, "back-end")
        self.dropout, self.backend = dropout, backend
        self._memory = GradientMemory()
        hidden = 2 * ffn if activation == "swiglu" else ffn
        self.weight_in = nn.Parameter(torch.empty(num_experts, dim, hidden))
        self.weight_out = nn.Parameter(torch.empty(num_experts, ffn, dim))
        self.bias_in = nn.Parameter(torch.empty(num_experts, hidden)) if bias else None
        self.bias_out = nn.Parameter(torch.empty(num_experts, dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights and biases as `nn.Linear` does: uniform within ``1 / sqrt(inputs)``.

        Raises:
            ValueError: If a parameter is parametrized.
        """
        self._refuse_parametrized()
        for parameter, inputs in (
            (self.weight_in, self.dim),
            (self.bias_in, self.dim),
            (self.weight_out, self.ffn),
            (self.bias_out, self.ffn),
        ):
            if parameter is not None:
                nn.init.uniform_(parameter, -(inputs**-0.5), inputs**-0.5)

    def keep(self, start: int, stop: int) -> None:
        """Keep a run of the experts: their part of every stacked parameter.

        Raises:
            ValueError: If a parameter is parametrized.
        """
        self._refuse_parametrized()
        for name, parameter in list(self.named_parameters()):
            setattr(self, name, nn.Parameter(parameter.detach()[start:stop].clone(), parameter.requires_grad))
        self.num_experts = stop - start

    def _refuse_parametrized(self) -> None:
        """Refuse to write parameters that are computed from others."""
        if is_parametrized(self):
            names = ", ".join(self.get_submodule("parametrizations")._modules)
            raise ValueError(
                "Parameters are initialised, and experts left out, where a tensor is stored; of these experts "
                f"{names} is computed by torch.nn.utils.parametrize. Remove the parametrization first."
            )

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
        hidden = self.activate(_linear(rows, self.weight_in, self.bias_in, tokens_per_expert))
        hidden = F.dropout(hidden, self.dropout, self.training)
        return _linear(hidden, self.weight_out, self.bias_out, tokens_per_expert)

    def activate(self, hidden: Float[Tensor, "assignments hidden"]) -> Float[Tensor, "assignments ffn"]:
        """Return the activations; a subclass with another function is computed row by row."""
        return activate(hidden, self.activation)

    def forward_routed(
        self, x: Float[Tensor, "tokens dim"], routing: Routing
    ) -> tuple[Float[Tensor, "tokens dim"], Routing] | None:
        """Run the fused feed-forward, which keeps no row per assignment; with biases or dropout there is none.

        Raises:
            ValueError: If items and parameters are of different types, outside of autocast, or the back-end given does
                not take them.
        """
        if routing.top_k is None or not self._can_fuse(x):
            return None
        x, weight_in, weight_out = _in_one_dtype(x, self.weight_in, self.weight_out)
        grouped, order = routing.by_expert()
        row_index = torch.empty_like(order).scatter(0, order, torch.arange(order.shape[0], device=order.device))
        row_index, lengths = row_index.view(routing.top_k, x.shape[0]), routing.sums.tokens_per_expert
        rows = (grouped.weight, grouped.token_index, row_index, lengths)
        if self.backend is None:
            rows = pad(*rows, grouped.expert_index, weight_in)
        output = routed_feed_forward(x, weight_in, weight_out, *rows, self.activation, self.backend, self._memory)
        return output, grouped

    def _can_fuse(self, x: Tensor) -> bool:
        """The fused operator has no bias and no dropout, and no rule for transforms, forward mode or export."""
        own, plain = type(self), GroupedFeedForward
        changed = own.forward is not plain.forward or own.activate is not plain.activate
        special = in_transform() or in_forward_mode() or is_exporting()
        return not (changed or special or self.bias_in is not None or (self.training and self.dropout > 0))

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return (
            f"num_experts={self.num_experts}, dim={self.dim}, ffn={self.ffn}, activation={self.activation}, "
            f"bias={self.bias_in is not None}, dropout={self.dropout}"
        )


def _in_one_dtype(rows: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
    """Convert to autocast's dtype where it is on, as `F.linear` would."""
    if torch.is_autocast_enabled(rows.device.type) and rows.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(rows.device.type)
        return tuple(tensor.to(dtype) for tensor in (rows, *parameters))
    for parameter in parameters:
        if rows.dtype != parameter.dtype:
            raise ValueError(
                f"GroupedFeedForward has parameters of {parameter.dtype} and got items of {rows.dtype}. Convert "
                "either with .to(dtype), or run under torch.autocast."
            )
    return (rows, *parameters)


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None, tokens_per_expert: Tensor) -> Tensor:
    """Apply each expert's linear layer to its rows."""
    rows, weight, *biases = _in_one_dtype(rows, weight, *([] if bias is None else [bias]))
    product = grouped_mm(rows, weight, tokens_per_expert)
    if bias is None:
        return product
    expert = expert_of_rows(tokens_per_expert.cumsum(0), rows.shape[0])
    return product + F.pad(biases[0], (0, 0, 0, 1)).index_select(0, expert)
