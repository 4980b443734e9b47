"""A mixture beside a dense branch, with a learned share of each."""

import math

import torch
from jaxtyping import Bool, Float, Num
from torch import Tensor, nn

from gatewright.experts.base import check_output_shape
from gatewright.layers.base import RoutedLayer
from gatewright.reset import reset_parts
from gatewright.routers.gate import Gate, gate_logits


class ResidualMixture(nn.Module):
    """``y = c_0 moe(x) + c_1 branch(x)`` with ``c = softmax(W x + b)``: a mixture that corrects a dense branch.

    The residual mixture of https://arxiv.org/abs/2201.05596 section 4.1, with the coefficients of DeepSpeed's code, two
    per item. They start at one half each and are computed in at least float32.

    Args:
        moe: The mixture, `MoE` or `MergedMoE`; `gatewright.aux_loss` finds it here.
        branch: Module that every item goes through, on flat items ``(tokens, *item)``; by default nothing, so that
            the input itself is added.

    Raises:
        ValueError: If the mixture is none, or the branch does not take its items or returns another shape.
    """

    def __init__(self, moe: RoutedLayer, branch: nn.Module | None = None) -> None:
        super().__init__()
        if not isinstance(moe, RoutedLayer):
            raise ValueError(
                f"The mixture is a gatewright.MoE or gatewright.MergedMoE; got {type(moe).__name__}. The dense module "
                "goes second: ResidualMixture(moe, branch)."
            )
        self.moe, self.branch = moe, nn.Identity() if branch is None else branch
        check_output_shape("the branch", self.branch, moe.item_shape, moe.output_shape)
        self.coefficient = Gate(math.prod(moe.item_shape), 2, bias=True)

    def reset_parameters(self) -> None:
        """Initialise mixture, branch and coefficient as construction does; see `gatewright.MoE.reset_parameters`."""
        reset_parts(self)

    def forward(
        self,
        x: Float[Tensor, "*batch_and_item"],
        features: Num[Tensor, "*batch_and_features"] | None = None,
        mask: Bool[Tensor, "*batch"] | None = None,
    ) -> Float[Tensor, "*batch_and_out"]:
        """Weigh what the mixture and the branch make of each item.

        The arguments are those of `RoutedLayer.forward`. The coefficient looks at the items, and the branch is called
        on zeros in place of masked ones.
        """
        items = self.moe.flat_items(x, mask)
        num_tokens = items.shape[0]
        mixed, kept = self.moe(x, features, mask).reshape(num_tokens, *self.moe.output_shape), self.branch(items)
        shares = self.shares(items).view(num_tokens, 2, *[1] * len(self.moe.output_shape))
        output = shares[:, 0] * mixed + shares[:, 1] * kept
        return self.moe.like_batch(output.to(torch.promote_types(mixed.dtype, kept.dtype)), x, mask)

    def shares(self, items: Float[Tensor, "tokens *item"]) -> Float[Tensor, "tokens 2"]:
        """Return the shares of mixture and branch, which add up to 1."""
        flat = items.reshape(items.shape[0], math.prod(self.moe.item_shape))
        return gate_logits(flat, self.coefficient).softmax(-1)
