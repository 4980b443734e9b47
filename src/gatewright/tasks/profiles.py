"""What each expert of an image classifier does, as a person sees it: its own images, its mistakes, and its worth."""

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from gatewright.data import ImageSet, evaluation_batches, thumbnail
from gatewright.layers import MoE
from gatewright.layers.base import RoutedLayer, moe_layers
from gatewright.routing import Routing

NUM_IMAGES, BATCH_SIZE = 1000, 250
"""Images that experts are looked at with: the first of the test set."""
NUM_EXAMPLES, NUM_MISTAKES, NUM_ALIKE = 6, 3, 128
FAR_BELOW = -1e4
"""Logit that no token chooses an expert by."""


@torch.inference_mode()
def expert_profiles(model: nn.Module, images: ImageSet) -> dict[str, dict[str, Any]]:
    """Look at the experts of every layer on the first images of a set, in evaluation mode.

    An image is an expert's own where it has the largest weight of all experts, summed over the image's tokens.

    Returns:
        By the name of a layer ``profiles``, one for each expert: its ``examples``, the own images of the largest
        weights; the ``accuracy`` on its own images, and what it ``confuses`` there; and the accuracy on all images
        ``without`` it, with the tokens sent to the next experts. Beside them ``confidence``, the mean weight of an
        image's own expert; ``alike``, the cosines of the experts' outputs for the same items, where each expert can be
        run alone; and ``of``, how many images this is about.
    """
    part = images.select(torch.arange(min(NUM_IMAGES, len(images))))
    layers = dict(moe_layers(model))
    if not layers or not len(part):
        return {}
    was_training = model.training
    model.eval()
    inputs, hooks = _see_inputs(layers)
    try:
        predicted, weights = _run(model, part)
    finally:
        for hook in hooks:
            hook.remove()
    found = {}
    for name, weight in weights.items():
        experts = range(weight.shape[1])
        without = [_accuracy_without(model, layers[name], expert, part) for expert in experts]
        found[name] = {
            "of": len(part),
            "confidence": float(weight.amax(1).mean()),
            "alike": _alike(layers[name], inputs.get(name)),
            "profiles": [
                _profile(part, predicted, weight[:, expert], weight.argmax(1) == expert) | {"without": without[expert]}
                for expert in experts
            ],
        }
    model.train(was_training)
    return found


def _see_inputs(layers: dict[str, RoutedLayer]) -> tuple[dict[str, Tensor], list[Any]]:
    """Keep the first items that each layer gets."""
    inputs: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        def see(layer: Any, given: tuple[Tensor, ...]) -> None:
            inputs.setdefault(name, given[0].detach().reshape(-1, *layer.item_shape)[:NUM_ALIKE])

        return see

    return inputs, [layer.register_forward_pre_hook(keep(name)) for name, layer in layers.items()]


def _run(model: nn.Module, part: ImageSet) -> tuple[Int[Tensor, " images"], dict[str, Float[Tensor, "images experts"]]]:
    """Return the class that each image is taken for, and by layer the weight of each expert for each image."""
    device, predicted = next(model.parameters()).device, []
    weights: dict[str, list[Tensor]] = {}
    for images, _ in evaluation_batches(part, BATCH_SIZE):
        predicted.append(model(images.to(device)).argmax(-1).cpu())
        for name, layer in moe_layers(model):
            if layer.routing is not None:
                weights.setdefault(name, []).append(_weights(layer.routing, len(images)))
            layer.routing = None
    return torch.cat(predicted), {name: torch.cat(each) for name, each in weights.items()}


def _weights(routing: Routing, num_images: int) -> Float[Tensor, "images experts"]:
    tokens = max(int(routing.sums.num_tokens) // num_images, 1)
    weight = routing.weight.float()
    cells = weight.new_zeros(num_images, routing.num_experts + 1)
    place = (routing.token_index // tokens, routing.expert_index)
    return cells.index_put(place, weight, accumulate=True)[:, :-1].cpu() / tokens


def _profile(part: ImageSet, predicted: Tensor, weight: Tensor, own: Tensor) -> dict[str, Any]:
    names, right = part.class_names, predicted == part.labels
    surest = weight.where(own, -1.0).sort(descending=True, stable=True).indices[: min(NUM_EXAMPLES, int(own.sum()))]
    wrong = (own & ~right).nonzero().flatten()
    pairs = Counter(zip(part.labels[wrong].tolist(), predicted[wrong].tolist(), strict=True))
    return {
        "own": int(own.sum()),
        "accuracy": float(right[own].float().mean()) if own.any() else None,
        "confuses": [[names[one], names[other], number] for (one, other), number in pairs.most_common(NUM_MISTAKES)],
        "examples": [
            {
                "image": thumbnail(part.images[place]),
                "class": names[part.labels[place]],
                "taken_for": names[predicted[place]],
                "weight": float(weight[place]),
            }
            for place in surest.tolist()
        ],
    }


def _accuracy_without(model: nn.Module, layer: RoutedLayer, expert: int, part: ImageSet) -> float | None:
    """Return the accuracy where no token chooses an expert; None where the router has no logit for each expert."""
    router: Any = layer.router
    gate = getattr(router, "gate", None)
    if not isinstance(gate, nn.Linear) or gate.out_features != router.num_experts:
        return None
    with _switched_off(gate, expert):
        predicted, _ = _run(model, part)
    return float((predicted == part.labels).float().mean())


@contextlib.contextmanager
def _switched_off(gate: nn.Module, expert: int) -> Iterator[None]:
    def lower(gate: nn.Module, inputs: object, logits: Tensor) -> Tensor:
        return logits.index_fill(-1, torch.tensor([expert], device=logits.device), FAR_BELOW)

    hook = gate.register_forward_hook(lower)
    try:
        yield
    finally:
        hook.remove()


def _alike(layer: RoutedLayer, items: Tensor | None) -> list[list[float]] | None:
    """Return the cosine between what each two experts make of the same items; None where not all experts are here."""
    if type(layer) is not MoE or items is None or layer.experts.num_experts != layer.router.num_experts:
        return None
    if any(isinstance(parameter, DTensor) for parameter in layer.experts.parameters()):
        return None
    number = layer.experts.num_experts
    counts = torch.full((number,), len(items), device=items.device)
    outputs = layer.experts(items.repeat(number, *[1] * (items.dim() - 1)), counts).view(number, -1).float()
    cosines: list[list[float]] = F.cosine_similarity(outputs[:, None], outputs[None], dim=-1).tolist()
    return cosines
