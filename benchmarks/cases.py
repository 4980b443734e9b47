"""What is measured: the shapes of a layer on each device, and the weights that all arms share."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One layer of feed-forward experts under a top-k softmax router, whose k weights sum to 1."""

    tokens: int
    dim: int
    ffn: int
    experts: int
    top_k: int
    activation: str = "swiglu"

    def __str__(self) -> str:
        """Show the sizes in the order of the tables."""
        sizes = f"{self.tokens}, {self.dim}, {self.ffn}, {self.experts}, {self.top_k}"
        return sizes if self.activation == "swiglu" else f"{sizes}, {self.activation}"


CASES = {
    "cpu": [
        Case(4096, 512, 1024, 8, 2),
        Case(4096, 256, 512, 64, 2),
        Case(2048, 128, 256, 256, 2),
        Case(1024, 512, 2048, 32, 2),
        Case(128, 768, 256, 128, 8),
        Case(16, 512, 1024, 8, 2),
        Case(4096, 192, 384, 8, 2, "gelu"),  # a layer of the recipe python-lm
    ],
    "cuda": [
        Case(40960, 768, 256, 128, 8),
        Case(40960, 768, 1024, 32, 2),
        Case(24576, 1536, 256, 128, 8),
        Case(24576, 1536, 1024, 32, 2),
        Case(32768, 4096, 1024, 64, 4),
        Case(32768, 2048, 768, 128, 8),
        Case(65536, 512, 2048, 64, 1),
        Case(4096, 512, 1024, 8, 2),
        Case(256, 2048, 768, 128, 8),
    ],
}
QUICK = Case(64, 16, 16, 4, 2)


@dataclass(frozen=True)
class Weights:
    """The parameters of a layer, matrices as ``(inputs, outputs)``; of SwiGLU the gate stands before the other half."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def double(self) -> "Weights":
        """Return the same values in float64."""
        return Weights(self.gate.double(), self.up.double(), self.down.double())


def make_items(case: Case, like: Tensor) -> Tensor:
    """Draw the tokens that every arm gets, of a tensor's dtype and on its device."""
    generator = torch.Generator(like.device).manual_seed(1)
    return torch.randn(case.tokens, case.dim, generator=generator, device=like.device).to(like.dtype)


def make_weights(case: Case, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> Weights:
    """Draw the parameters that every arm gets a copy of."""
    generator = torch.Generator(device).manual_seed(0)
    hidden = 2 * case.ffn if case.activation == "swiglu" else case.ffn

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, device=device) * shape[-2] ** -0.5).to(dtype)

    return Weights(
        gate=draw(case.dim, case.experts),
        up=draw(case.experts, case.dim, hidden),
        down=draw(case.experts, case.ffn, case.dim),
    )
