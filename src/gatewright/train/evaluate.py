"""Evaluation: every image once, in evaluation mode, and which expert saw which class."""

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from gatewright.data import ImageSet, evaluation_batches
from gatewright.routed import RoutedLayer, moe_layers
from gatewright.routing import Routing, RoutingSums
from gatewright.train.config import Precision
from gatewright.train.engine import autocast


@dataclass(frozen=True)
class LayerUse:
    """How a set of images used one MoE layer.

    Args:
        sums: The routing's sums over the whole set.
        class_by_expert: Assignments of each class's images to each expert.
    """

    sums: RoutingSums
    class_by_expert: Int[Tensor, "classes experts"]


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a set of images.

    Args:
        confusion: Images by true class (rows) and predicted class (columns).
        layers: Use of each MoE layer, by its name in the model.
    """

    confusion: Int[Tensor, "classes classes"]
    layers: dict[str, LayerUse]

    @property
    def accuracy(self) -> float:
        """Share of images classified right, in [0, 1]."""
        return float(self.confusion.diagonal().sum() / self.confusion.sum().clamp(min=1))

    @property
    def accuracy_per_class(self) -> Float[Tensor, " classes"]:
        """Share of each class's images classified right; 0 for a class without images."""
        return self.confusion.diagonal() / self.confusion.sum(1).clamp(min=1)


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    images: ImageSet,
    *,
    batch_size: int,
    precision: Precision = "float32",
    flip: bool = False,
) -> Evaluation:
    """Classify every image once and count what happened.

    Args:
        model: Maps images in [0, 1] to logits; left in the mode in which it came.
        images: The set.
        batch_size: Images at a time; accuracies do not depend on it.
        precision: As in training.
        flip: Average the probabilities of each image and its mirror image (test-time augmentation). The experts' load
            is that of the images themselves.
    """
    num_classes = len(images.class_names)
    device = next(model.parameters()).device
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    layers: dict[str, LayerUse] = {}
    was_training = model.training
    model.eval()
    for batch, labels in evaluation_batches(images, batch_size):
        pixels = batch.to(device)
        with autocast(device, precision):
            probs = model(pixels).float().softmax(-1)
            _add_use(layers, model, labels, num_classes)
            if flip:
                probs = probs + model(pixels.flip(-1)).float().softmax(-1)
        predicted = probs.argmax(-1).cpu()
        confusion += torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view_as(confusion)
    model.train(was_training)
    return Evaluation(confusion, layers)


def _add_use(layers: dict[str, LayerUse], model: nn.Module, labels: Tensor, num_classes: int) -> None:
    for name, layer in moe_layers(model):
        routing = take_routing(layer)
        if routing is None:
            continue
        seen = class_by_expert(routing, labels.to(routing.token_index.device), num_classes)
        use = layers.get(name)
        layers[name] = LayerUse(
            routing.sums if use is None else use.sums + routing.sums,
            seen if use is None else use.class_by_expert + seen,
        )


def take_routing(layer: RoutedLayer) -> Routing | None:
    """Return the routing of the last forward and forget it; None where the layer did not run since."""
    routing, layer.routing = layer.routing, None
    return routing


def class_by_expert(
    routing: Routing, labels: Int[Tensor, " images"], num_classes: int
) -> Int[Tensor, "classes experts"]:
    """Count assignments by the class of their image and by expert; an image may be several tokens."""
    tokens_per_image = int(routing.sums.num_tokens) // max(len(labels), 1)
    image = routing.token_index // max(tokens_per_image, 1)
    cell = labels[image] * routing.num_experts + routing.expert_index
    kept = cell[routing.expert_index < routing.num_experts]
    return torch.bincount(kept, minlength=num_classes * routing.num_experts).view(num_classes, -1).cpu()
