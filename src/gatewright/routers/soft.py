"""Soft routing: no token is sent anywhere, every slot of every expert gets a weighted mean of all tokens."""

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float, Num
from torch import Tensor, nn

from gatewright.routers.base import Gate, Router, gate_logits
from gatewright.routing import SoftRouting, soft_routing
from gatewright.scope import ONE_PROCESS, BatchScope

EPSILON = 1e-6


class CosineGate(Gate):
    """A gate whose logits are cosines: features, and its rows, are divided by their lengths first."""

    def reset_parameters(self) -> None:
        """Draw rows of length 1 on average."""
        super().reset_parameters()
        nn.init.normal_(self.weight, std=self.in_features**-0.5)

    def forward(self, input: Num[Tensor, "*batch dim"]) -> Float[Tensor, "*batch choices"]:  # noqa: A002 - torch's name
        """Return the cosines."""
        dtype = torch.promote_types(torch.promote_types(input.dtype, self.weight.dtype), torch.float32)
        with torch.autocast(input.device.type, enabled=False):
            return F.linear(_unit(input.to(dtype)), _unit(self.weight.to(dtype)))


class Soft(Router):
    """Mix the tokens of a group into slots, and the slots' outputs into tokens: https://arxiv.org/abs/2308.00951.

    ``Y = C f(D^T X)``: logits are ``scale X Phi``, with the rows of X and the columns of Phi at length 1; D is their
    softmax over the tokens of a group (eq. 1), C their softmax over all slots (eq. 2). Nothing is random, nothing is
    dropped, and the experts' load needs no loss.

    An item's output depends on the tokens of its group, also in evaluation. It is independent of the rest of the batch
    for ``group_size=n``, where a group is a sequence or the patches of an image (the paper's own use), and for
    ``group_size=1``; not for ``group_size=None``, where the (global) batch is one group, which is the paper's where a
    batch is one sequence.

    Args:
        dim: Size of the features a token is routed by.
        num_experts: How many experts there are.
        slots_per_expert: Rows that each expert gets per group; they, not the experts, are what a layer costs.
        group_size: How many consecutive tokens are a group; None takes the whole (global) batch. At 1 every token goes
            to every expert as it is, weighed by a softmax: a second slot of an expert would be a repetition.

    Raises:
        ValueError: If a size is below 1.
    """

    dense: ClassVar[bool] = True

    def __init__(self, dim: int, num_experts: int, *, slots_per_expert: int = 1, group_size: int | None = None) -> None:
        super().__init__(dim, num_experts, num_experts)
        if slots_per_expert < 1 or (group_size is not None and group_size < 1):
            raise ValueError(
                f"slots_per_expert and group_size are at least 1; got {slots_per_expert} and {group_size}. For one "
                "group of the whole batch use group_size=None."
            )
        self.slots_per_expert, self.group_size = slots_per_expert, group_size
        self.gate = CosineGate(dim, num_experts * slots_per_expert, bias=False)
        self.scale = nn.Parameter(torch.ones(1))  # FSDP2 and DeepSpeed take no parameter without dimensions.

    def reset_parameters(self) -> None:
        """Draw the gate as construction does, and set the scale to 1."""
        super().reset_parameters()
        nn.init.ones_(self.scale)

    def forward(self, features: Float[Tensor, "tokens dim"], scope: BatchScope = ONE_PROCESS) -> SoftRouting:
        """Weigh every token for every slot; the same in training and evaluation.

        Raises:
            ValueError: If the number of tokens is not a multiple of group_size.
        """
        cosines, slots = gate_logits(features, self.gate), (self.num_experts, self.slots_per_expert)
        logits = self.scale.to(cosines.dtype) * cosines
        if self.group_size is None:
            grouped, dispatch = logits[None], softmax_over_batch(logits, scope)[None]
        else:
            grouped, scope = self._grouped(logits, self.group_size), ONE_PROCESS
            dispatch = grouped.softmax(1)
        return soft_routing(logits, dispatch.unflatten(2, slots), grouped.softmax(2).unflatten(2, slots), scope)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        """Take a scale without dimensions too, as older checkpoints hold it."""
        if isinstance(scale := state_dict.get(f"{prefix}scale"), Tensor) and scale.dim() == 0:
            state_dict[f"{prefix}scale"] = scale.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def _grouped(
        self, logits: Float[Tensor, "tokens slots"], group_size: int
    ) -> Float[Tensor, "groups group_tokens slots"]:
        if logits.shape[0] % group_size:
            raise ValueError(
                f"The number of tokens is a multiple of group_size ({group_size}); got {logits.shape[0]}. Pass whole "
                "groups, or choose another group_size: 1 for tokens on their own, None for the batch as one group."
            )
        grouped: Tensor = logits.unflatten(0, (logits.shape[0] // group_size, group_size))
        return grouped

    def extra_repr(self) -> str:
        """Show the sizes when a model is printed."""
        return (
            f"dim={self.dim}, num_experts={self.num_experts}, slots_per_expert={self.slots_per_expert}, "
            f"group_size={self.group_size}"
        )


def softmax_over_batch(logits: Float[Tensor, "tokens slots"], scope: BatchScope) -> Float[Tensor, "tokens slots"]:
    """Softmax over the tokens of the global batch, of which these are a process's part."""
    total = scope.gather(logits.logsumexp(0, keepdim=True)).logsumexp(0)
    return (logits - total).exp()


def _unit(vectors: Float[Tensor, "*vectors dim"]) -> Float[Tensor, "*vectors dim"]:
    """Divide each vector by its length, as algorithm 2 does: a vector of zeros stays one."""
    lengths: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    return vectors / (lengths + EPSILON)
