"""The gate: the linear layer inside a router."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from gatewright.ops import wide_product


class Gate(nn.Linear):
    """The linear layer inside a router: it computes in at least float32, whatever autocast or its parameters say.

    float64 stays float64. A router calls it as a module, so hooks, adapters and wrappers work as on any other layer,
    and any module from ``(tokens, dim)`` to ``(tokens, experts)`` may take its place: see `gate_logits`.
    """

    def reset_parameters(self) -> None:
        """Start at zero, as https://arxiv.org/abs/1701.06538 appendix A starts its gates."""
        super().reset_parameters()  # Draws what is overwritten: a seed goes on to give the numbers it always gave.
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, input: Num[Tensor, "*batch dim"]) -> Float[Tensor, "*batch choices"]:  # noqa: A002 - torch's name
        """Return the logits."""
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.weight.dtype), torch.float32)
        bias = None if self.bias is None else self.bias.to(dtype)
        with torch.autocast(input.device.type, enabled=False):
            product = wide_product(input, self.weight)
            if product is None:
                return F.linear(input.to(dtype), self.weight.to(dtype), bias)
        return product if bias is None else product + bias


class EvenGate(Gate):
    """A gate whose first logits are small, so that no expert is favoured from the start."""

    def reset_parameters(self) -> None:
        """Draw weights by Switch's initialisation scaled by 0.1, cut at two deviations.

        https://arxiv.org/abs/2101.03961 section 2.4. A bias starts at zero.
        """
        super().reset_parameters()
        std = (0.1 / self.in_features) ** 0.5
        nn.init.trunc_normal_(self.weight, std=std, a=-2 * std, b=2 * std)


def gate_logits(features: Num[Tensor, "tokens dim"], gate: nn.Module) -> Float[Tensor, "tokens experts"]:
    """Call a gate, and return logits of at least float32.

    A `Gate` computes in at least float32 by itself. Another module in its place computes in the type of its own
    parameters, also under autocast.
    """
    if not isinstance(gate, Gate):
        own = (parameter.dtype for parameter in gate.parameters() if parameter.is_floating_point())
        features = features.to(next(own, torch.float32))
    with torch.autocast(features.device.type, enabled=False):
        logits: Tensor = gate(features)
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
