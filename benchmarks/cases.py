"""What is measured: nine shapes of a layer, and the weights that all arms share."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One layer of SwiGLU experts under a top-k softmax router, in bfloat16."""

    tokens: int
    dim: int
    ffn: int
    experts: int
    top_k: int

    def __str__(self) -> str:
        """Show the sizes in the order of the tables."""
        return f"{self.tokens}, {self.dim}, {self.ffn}, {self.experts}, {self.top_k}"


CASES = [
    Case(40960, 768, 256, 128, 8),
    Case(40960, 768, 1024, 32, 2),
    Case(24576, 1536, 256, 128, 8),
    Case(24576, 1536, 1024, 32, 2),
    Case(32768, 4096, 1024, 64, 4),
    Case(32768, 2048, 768, 128, 8),
    Case(65536, 512, 2048, 64, 1),
    Case(4096, 512, 1024, 8, 2),
    Case(256, 2048, 768, 128, 8),
]


@dataclass(frozen=True)
class Weights:
    """The parameters of a layer, matrices as ``(inputs, outputs)``, gate before up."""

    gate: Tensor
    up: Tensor
    down: Tensor


def make_weights(case: Case, dtype: torch.dtype = torch.bfloat16) -> Weights:
    """Draw the parameters that every arm gets a copy of."""
    generator = torch.Generator("cuda").manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * shape[-2] ** -0.5).to(dtype)

    return Weights(
        gate=draw(case.dim, case.experts),
        up=draw(case.experts, case.dim, 2 * case.ffn),
        down=draw(case.experts, case.ffn, case.dim),
    )
