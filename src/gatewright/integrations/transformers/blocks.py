"""The mixtures of Mixtral, Qwen3-MoE and gpt-oss as Gatewright's layers, and back."""

import copy
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.experts import GroupedFeedForward
from gatewright.layers import MoE
from gatewright.losses import Coefficients
from gatewright.routers import TopK

Rearrange = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Kind:
    """What tells one kind of block from another.

    Args:
        router: The name of the router in the block.
        normalized: Whether the weights of a token's experts sum to 1.
        returns_scores: Whether the block returns a tuple, whose second part nobody reads.
    """

    router: str
    normalized: Callable[[Any], bool]
    returns_scores: bool = False


KINDS: Mapping[str, Kind] = {
    "MixtralSparseMoeBlock": Kind("gate", lambda router: True),
    "Qwen3MoeSparseMoeBlock": Kind("gate", lambda router: bool(router.norm_topk_prob)),
    "GptOssMLP": Kind("router", lambda router: True, returns_scores=True),
}
"""The blocks that become layers, by their class."""


class ClampedSwiGLU(GroupedFeedForward):
    """The experts of gpt-oss: ``clamp(gate) * sigmoid(alpha * clamp(gate)) * (clamp(up) + 1)``, with biases.

    Args:
        num_experts: Number of experts.
        dim: Size of an item, in and out.
        ffn: Size of the hidden layer.
        alpha: Factor of the gate inside the sigmoid.
        limit: Bound of the gate from above, and of the other half on both sides.
    """

    def __init__(self, num_experts: int, dim: int, ffn: int, *, alpha: float, limit: float) -> None:
        super().__init__(num_experts, dim, ffn, activation="swiglu", bias=True)
        self.alpha, self.limit = alpha, limit

    def activate(self, hidden: Float[Tensor, "assignments hidden"]) -> Float[Tensor, "assignments ffn"]:
        """Return the activations."""
        gate, up = hidden.chunk(2, dim=-1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return (up + 1) * gate * torch.sigmoid(self.alpha * gate)


class MixtureBlock(nn.Module):
    """A Gatewright layer in the place of a block of transformers, which is called as the block is.

    Args:
        layer: The layer.
        block: The block, whose form is kept and whose tensors are not.
    """

    def __init__(self, layer: MoE, block: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self._form = (_copied(block).to("meta"),)  # In a tuple, so that it is no part of the model.

    def forward(self, hidden_states: Float[Tensor, "*batch dim"]) -> Any:
        """Return the layer's output, with None for the scores where the block returns these too."""
        output = self.layer(hidden_states)
        return (output, None) if kind_of(self._form[0]).returns_scores else output

    def to_transformers(self) -> Any:
        """Return a block of the original kind with the layer's tensors.

        Raises:
            ValueError: If the layer has another number of experts by now, or more than one goes to a token.
        """
        block, router = _copied(self._form[0]), self.layer.router
        theirs = getattr(block, kind_of(block).router)
        if (router.num_experts, router.top_k) != (theirs.num_experts, theirs.top_k):
            raise ValueError(
                f"A block of transformers has the experts that its config says: {theirs.num_experts}, of which "
                f"{theirs.top_k} for each token; the layer has {router.num_experts} and {router.top_k}. Save the "
                "layer's own state dict, or make the model of a config with these numbers."
            )
        block.to_empty(device=next(router.parameters()).device)
        for ours, tensor, _, back in _tensors(self.layer, block):
            tensor.data = back(ours.detach()).contiguous().clone()
        block.train(self.training)
        return block


def from_transformers(model: nn.Module, *, losses: Coefficients | None = None) -> nn.Module:
    """Put a Gatewright layer in place of every mixture of a model of Mixtral, Qwen3-MoE or gpt-oss.

    The outputs stay the same. Each `MixtureBlock` holds its layer as ``layer``, which `gatewright.moe_layers` finds, so
    that all of Gatewright works on the model: its balance losses, whose sum is `gatewright.aux_loss(model)`, its
    surgery, its replay. The model's own router logits and its own auxiliary loss are no longer there.

    Args:
        model: The model, which is changed in place, or one block.
        losses: Coefficient per auxiliary loss, as in `MoE`.

    Returns:
        The model, or the `MixtureBlock` that takes the place of a block.

    Raises:
        ValueError: If there is no such block, or its experts have an activation that the layer has not; the model is as
            it was.
    """
    return _replaced(model, lambda each: type(each).__name__ in KINDS, lambda block: _mixture(block, losses))


def to_transformers(model: nn.Module) -> nn.Module:
    """Put the blocks of transformers back in place of every `MixtureBlock`, with the tensors that the layers have.

    Raises:
        ValueError: If there is none, or a layer has another number of experts by now.
    """
    return _replaced(model, lambda each: isinstance(each, MixtureBlock), lambda block: block.to_transformers())


def kind_of(block: nn.Module) -> Kind:
    """Return what is special about a block."""
    return KINDS[type(block).__name__]


def _copied(block: Any) -> Any:
    """Copy a block, but not its config, which says for the whole model how experts are computed."""
    config = getattr(block.experts, "config", None)
    return copy.deepcopy(block, {id(config): config})


def _replaced(model: nn.Module, matches: Callable[[nn.Module], bool], make: Callable[[Any], nn.Module]) -> nn.Module:
    if matches(model):
        return make(model)
    made = {name: make(module) for name, module in model.named_modules() if matches(module)}
    if not made:
        raise ValueError(
            f"This {type(model).__name__} has none of the blocks that are exchanged: {', '.join(KINDS)}, and the "
            "MixtureBlock in their place. Call surgery.upcycle to make mixtures of a dense model."
        )
    for name, module in made.items():
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, module)
    return model


@torch.no_grad()
def _mixture(block: Any, losses: Coefficients | None) -> MixtureBlock:
    kind, experts = kind_of(block), block.experts
    theirs = getattr(block, kind.router)
    num_experts, dim = theirs.weight.shape
    router = TopK(
        dim,
        num_experts,
        theirs.top_k,
        score_after_top_k=kind.normalized(theirs),
        jitter=getattr(block, "jitter_noise", 0.0),
        gate_bias=getattr(theirs, "bias", None) is not None,
    )
    layer = MoE(router, _experts(experts, num_experts, dim), losses=losses).to(theirs.weight)
    for ours, tensor, into, _ in _tensors(layer, block):
        ours.data = into(tensor.detach()).contiguous().clone()
        ours.requires_grad_(tensor.requires_grad)
    return MixtureBlock(layer, block).train(block.training)


def _experts(experts: Any, num_experts: int, dim: int) -> GroupedFeedForward:
    if experts.has_bias:
        ffn = experts.down_proj.shape[1]
        return ClampedSwiGLU(num_experts, dim, ffn, alpha=experts.alpha, limit=experts.limit)
    if (activation := type(experts.act_fn).__name__) not in ("SiLU", "SiLUActivation"):
        raise ValueError(f"A gated layer has the activation SiLU, and this block has {activation}. Use `register`.")
    return GroupedFeedForward(num_experts, dim, experts.down_proj.shape[2], activation="swiglu")


def _tensors(layer: Any, block: Any) -> Iterator[tuple[nn.Parameter, nn.Parameter, Rearrange, Rearrange]]:
    """Yield each tensor of a layer with the block's, and what makes the one of the other and back."""
    theirs, ours = getattr(block, kind_of(block).router), layer.router.gate
    yield ours.weight, theirs.weight, _same, _same
    experts = block.experts
    if not experts.has_bias:
        yield layer.experts.weight_in, experts.gate_up_proj, _transposed, _transposed
        yield layer.experts.weight_out, experts.down_proj, _transposed, _transposed
        return
    yield ours.bias, theirs.bias, _same, _same
    yield layer.experts.weight_in, experts.gate_up_proj, _apart, _interleaved
    yield layer.experts.bias_in, experts.gate_up_proj_bias, _apart, _interleaved
    yield layer.experts.weight_out, experts.down_proj, _same, _same
    yield layer.experts.bias_out, experts.down_proj_bias, _same, _same


def _same(tensor: Tensor) -> Tensor:
    return tensor


def _transposed(tensor: Tensor) -> Tensor:
    return tensor.transpose(-2, -1)


def _apart(tensor: Tensor) -> Tensor:
    """Put the gate's columns, which are every other one, before the rest."""
    return torch.cat([tensor[..., ::2], tensor[..., 1::2]], dim=-1)


def _interleaved(tensor: Tensor) -> Tensor:
    halves: Tensor = tensor.unflatten(-1, (2, -1))
    return halves.transpose(-2, -1).flatten(-2)
