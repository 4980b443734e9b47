"""Evaluation: every image once, in evaluation mode, and which expert saw which class."""

import math
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Real
from torch import Tensor, nn

from gatewright.data import ImageSet, evaluation_batches
from gatewright.layers.base import moe_layers
from gatewright.routing import Routing, RoutingSums
from gatewright.train.config import Precision
from gatewright.train.device import autocast
from gatewright.train.step import take_routing
from gatewright.train.strategies.base import ALONE, Processes


@dataclass(frozen=True)
class LayerUse:
    """How a set of images used one MoE layer.

    Args:
        sums: The routing's sums over the whole set.
        class_by_expert: Assignments of each class's images to each expert; of `SoftMoE`, sums of weights.
        tokens_per_class: Tokens of each class's images: the images themselves where they are routed as a whole.
    """

    sums: RoutingSums
    class_by_expert: Real[Tensor, "classes experts"]
    tokens_per_class: Int[Tensor, " classes"]

    def tensors(self) -> tuple[Tensor, ...]:
        """Return every sum, all of them additive."""
        return (
            *self.sums.by_name().values(),
            self.class_by_expert,
            self.tokens_per_class,
        )

    def __add__(self, other: Self) -> Self:
        """Add the use by another batch."""
        return type(self)(
            self.sums + other.sums,
            self.class_by_expert + other.class_by_expert,
            self.tokens_per_class + other.tokens_per_class,
        )


@dataclass(frozen=True)
class Evaluation:
    """What a model makes of a set of images.

    Args:
        confusion: Images by true class (rows) and predicted class (columns).
        layers: Use of each MoE layer, by its name in the model.
        loss: Mean cross-entropy of the images, without label smoothing; 0 where there are none.
    """

    confusion: Int[Tensor, "classes classes"]
    layers: dict[str, LayerUse]
    loss: float

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
    processes: Processes = ALONE,
) -> Evaluation:
    """Classify every image once and count what happened.

    Args:
        model: Maps images in [0, 1] to logits; left in the mode in which it came.
        images: The set.
        batch_size: Images at a time; accuracies do not depend on it.
        precision: As in training.
        flip: Average the probabilities of each image and its mirror image (test-time augmentation). The experts' load
            is that of the images themselves.
        processes: Those of the run; each classifies its part of every batch, and all of them get the whole evaluation.
    """
    num_classes = len(images.class_names)
    device = next(model.parameters()).device
    confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
    total_loss = torch.zeros((), dtype=torch.float64)
    layers: dict[str, LayerUse] = {}
    was_training = model.training
    model.eval()
    for batch, all_labels in evaluation_batches(images, batch_size):
        own = processes.share(len(all_labels))  # In lock-step: a process without images still takes part.
        pixels, labels = batch[own].to(device), all_labels[own]
        with autocast(device, precision):
            log_probs = model(pixels).float().log_softmax(-1)
            _add_use(layers, model, labels, num_classes)
            if flip:
                mirrored = model(pixels.flip(-1)).float().log_softmax(-1)
                log_probs = torch.logaddexp(log_probs, mirrored) - math.log(2)
        predicted = log_probs.argmax(-1).cpu()
        total_loss += F.nll_loss(log_probs.double().cpu(), labels, reduction="sum")
        confusion += torch.bincount(labels * num_classes + predicted, minlength=num_classes**2).view_as(confusion)
    model.train(was_training)
    processes.sum(confusion, total_loss, *(tensor for use in layers.values() for tensor in use.tensors()))
    return Evaluation(confusion, layers, float(total_loss / confusion.sum().clamp(min=1)))


def _add_use(layers: dict[str, LayerUse], model: nn.Module, labels: Tensor, num_classes: int) -> None:
    for name, layer in moe_layers(model):
        routing = take_routing(layer)
        if routing is None:
            continue
        seen = class_by_expert(routing, labels.to(routing.sums.load.device), num_classes)
        tokens = labels.bincount(minlength=num_classes) * _tokens_per_image(routing, labels)
        use = LayerUse(routing.sums, seen, tokens)
        layers[name] = layers[name] + use if name in layers else use


def class_by_expert(
    routing: Routing, labels: Int[Tensor, " images"], num_classes: int
) -> Real[Tensor, "classes experts"]:
    """Count assignments by the class of their image and by expert, or add up weights; an image may be many tokens."""
    tokens_per_image = max(_tokens_per_image(routing, labels), 1)
    by_weight = routing.sums.tokens_per_expert.is_floating_point()  # of a router that sends every token everywhere
    counted = routing.weight if by_weight else torch.ones_like(routing.expert_index)
    cells = counted.new_zeros(num_classes, routing.num_experts + 1)
    place = (labels[routing.token_index // tokens_per_image], routing.expert_index)
    return cells.index_put(place, counted, accumulate=True)[:, :-1].cpu()


def _tokens_per_image(routing: Routing, labels: Int[Tensor, " images"]) -> int:
    return int(routing.sums.num_tokens) // max(len(labels), 1)
