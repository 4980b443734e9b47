"""How useful each expert of a mixture is, measured on inputs."""

from collections.abc import Iterable
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.layers import MoE
from gatewright.layers.base import moe_layers
from gatewright.surgery.experts import check_experts_here
from gatewright.surgery.replace import evaluate


class _Seen:
    """What was seen of one layer's experts: their tokens, and their weights times the lengths of their outputs.

    Args:
        layer: The layer, of which two hooks see the experts' rows and the routing.
    """

    def __init__(self, layer: MoE) -> None:
        self.tokens, self.contribution = torch.zeros(2, layer.router.num_experts, dtype=torch.float64)
        self._lengths = torch.empty(0)
        self.hooks = [
            layer.experts.register_forward_hook(self._see_rows),
            layer.register_forward_hook(self._see_routing),
        ]

    def _see_rows(self, experts: nn.Module, inputs: object, rows: Tensor) -> None:
        self._lengths = torch.linalg.vector_norm(rows.detach().flatten(1).double(), dim=1)

    def _see_routing(self, layer: MoE, inputs: object, output: object) -> None:
        assert layer.routing is not None
        expert, weight = layer.routing.expert_index.cpu(), layer.routing.weight.double() * self._lengths
        kept = expert < len(self.tokens)  # Others are masked.
        self.tokens.index_add_(0, expert[kept], torch.ones(int(kept.sum()), dtype=torch.float64))
        self.contribution.index_add_(0, expert[kept], weight.cpu()[kept])


@torch.no_grad()
def expert_scores(
    model: nn.Module, inputs: Iterable[Any], by: Literal["contribution", "load"] = "contribution"
) -> dict[str, Float[Tensor, " experts"]]:
    """Measure how useful each expert is, on inputs in evaluation mode.

    Args:
        model: A model with mixtures.
        inputs: Inputs of the model: a tensor, or a tuple or a mapping of several, for each forward.
        by: ``"load"`` is an expert's share of the assignments. ``"contribution"`` is the mean, over the tokens of an
            expert, of its weight times the length of its output, as in https://arxiv.org/abs/2510.13999, and 0 where it
            has none.

    Returns:
        One number for each expert, by the name of the layer.

    Raises:
        ValueError: If `by` is something else, or the experts are not all in this process.
    """
    if by not in ("contribution", "load"):
        raise ValueError(f"Experts are measured by 'contribution' or 'load'; got {by!r}.")
    layers = {name: layer for name, layer in moe_layers(model) if isinstance(layer, MoE)}
    for name, layer in layers.items():
        check_experts_here(name, layer)
    seen = {name: _Seen(layer) for name, layer in layers.items()}
    try:
        evaluate(model, inputs)
    finally:
        for each in seen.values():
            for hook in each.hooks:
                hook.remove()
    if by == "load":
        return {name: each.tokens / each.tokens.sum().clamp(min=1) for name, each in seen.items()}
    return {name: each.contribution / each.tokens.clamp(min=1) for name, each in seen.items()}
