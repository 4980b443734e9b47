"""The feed-forward block: found in torch's Transformer layers, and taken apart into its hidden units."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxtyping import Float, Int
from torch import Tensor, nn


class FeedForward(nn.Module):
    """``linear2(dropout(activation(linear1(x))))``, as one module.

    Args:
        linear1: The layer from the items to the hidden units.
        activation: Function that is applied to the hidden units.
        dropout: The dropout of the hidden units.
        linear2: The layer from the hidden units to the output.
    """

    def __init__(
        self, linear1: nn.Linear, activation: Callable[[Tensor], Tensor], dropout: nn.Module, linear2: nn.Linear
    ) -> None:
        super().__init__()
        self.linear1, self.activation, self.dropout, self.linear2 = linear1, activation, dropout, linear2

    def forward(self, x: Float[Tensor, "*batch dim"]) -> Float[Tensor, "*batch out"]:
        """Return the output of the block."""
        output: Tensor = self.linear2(self.dropout(self.activation(self.linear1(x))))
        return output


def expose_feed_forward(model: nn.Module) -> nn.Module:
    """Make the feed-forward block of every torch Transformer layer a module of its own, so that it can be replaced.

    `torch.nn.TransformerEncoderLayer` and `torch.nn.TransformerDecoderLayer` hold the parts of the block but no module
    for it. Afterwards ``linear1`` is a `FeedForward`, and what followed it is the identity. The outputs are the same;
    torch's fused path for evaluation, which reads the weights of two linear layers, is off.

    Args:
        model: Any model. It is changed in place, and returned.
    """
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoder):
            module.use_nested_tensor = False
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) and isinstance(
            module.linear1, nn.Linear
        ):
            block = FeedForward(module.linear1, module.activation, module.dropout, module.linear2)
            module.linear1 = block.train(module.training)  # type: ignore[assignment]
            module.activation = module.dropout = module.linear2 = nn.Identity()  # type: ignore[assignment]
            module.activation_relu_or_gelu = 0
    return model


@dataclass(frozen=True)
class HiddenUnits:
    """The hidden units of a feed-forward block: the layers that end in them, and the one that begins with them.

    Args:
        before: One linear layer, or two in a gated block; each row of their weights is one hidden unit.
        after: The linear layer whose columns are the hidden units.
    """

    before: tuple[nn.Linear, ...]
    after: nn.Linear

    @property
    def number(self) -> int:
        """How many hidden units there are."""
        return self.after.in_features

    def slices(self, units: Int[Tensor, " units"]) -> list[tuple[Tensor, tuple[Any, ...]]]:
        """Return every weight matrix with the index of what of it belongs to some hidden units."""
        rows: list[tuple[Tensor, tuple[Any, ...]]] = [(layer.weight, (units,)) for layer in self.before]
        return [*rows, (self.after.weight, (slice(None), units))]

    def keep(self, units: Int[Tensor, " units"]) -> None:
        """Keep some hidden units and forget the others, in place."""
        for layer in self.before:
            layer.weight = _part(layer.weight, units, 0)
            layer.bias = None if layer.bias is None else _part(layer.bias, units, 0)
            layer.out_features = len(units)
        self.after.weight, self.after.in_features = _part(self.after.weight, units, 1), len(units)


def hidden_units_of(module: nn.Module) -> HiddenUnits:
    """Find the hidden units of a feed-forward block by the sizes of its linear layers.

    Raises:
        ValueError: If the module is not one linear layer in, or two where it is gated, and one out.
    """
    linears = [part for part in module.modules() if isinstance(part, nn.Linear)]
    for after in reversed(linears):
        before = tuple(layer for layer in linears if layer is not after)
        if 1 <= len(before) <= 2 and all(
            (layer.in_features, layer.out_features) == (before[0].in_features, after.in_features) for layer in before
        ):
            return HiddenUnits(before, after)
    sizes = ", ".join(f"{layer.in_features} -> {layer.out_features}" for layer in linears) or "none"
    raise ValueError(
        "Hidden units are found in a feed-forward block: one linear layer in, or two where it is gated, and one out; "
        f"the linear layers of this {type(module).__name__} are {sizes}. Match the feed-forward blocks; copies of "
        "other modules are split by add_noise."
    )


def _part(parameter: Tensor, units: Tensor, dim: int) -> nn.Parameter:
    part = parameter.detach().index_select(dim, units.to(parameter.device))
    return nn.Parameter(part, requires_grad=parameter.requires_grad)
