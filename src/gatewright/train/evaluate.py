"""Evaluation: every item once, in evaluation mode, and which expert saw items of which class."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gatewright.layers.base import moe_layers
from gatewright.tasks import Batch, Evaluation, LayerUse, Task
from gatewright.train.config import Precision
from gatewright.train.device import autocast
from gatewright.train.step import take_routing
from gatewright.train.strategies.single import ALONE, Strategy


@torch.inference_mode()
def evaluate(
    task: Task,
    model: nn.Module,
    part: Any,
    *,
    batch_size: int,
    precision: Precision = "float32",
    forward: Callable[[nn.Module, Tensor], Tensor] = nn.Module.__call__,
    strategy: Strategy = ALONE,
) -> Evaluation:
    """Run the model on every item once and count what happened.

    Args:
        task: Task of the model.
        model: The model, which is left in the mode in which it came.
        part: The items, of the type that the task loads.
        batch_size: Items at a time; the figures do not depend on it.
        precision: Number format of the forward passes, as in training.
        forward: Calls the model on a batch; another than the plain call may average several views of it, for one.
        strategy: That of the run; each evaluates its part of every batch, and all of them get the whole evaluation.
    """
    device = next(model.parameters()).device
    num_classes = len(task.class_names(part))
    sums: dict[str, Tensor] = {}
    layers: dict[str, LayerUse] = {}
    was_training = model.training
    model.eval()
    for whole in task.evaluation_batches(part, batch_size):
        own = strategy.shard_batch(len(whole[0]))  # In lock-step: a process without items still takes part.
        batch: Batch = tuple(tensor[own].to(device) for tensor in whole)
        with autocast(device, precision):
            measured = task.measure(forward(model, batch[0]), batch)
        _add_use(layers, model, task.classes(batch), num_classes)
        sums = {name: sums[name] + value.cpu() if name in sums else value.cpu() for name, value in measured.items()}
    model.train(was_training)
    for tensor in (*sums.values(), *(tensor for use in layers.values() for tensor in use.tensors())):
        strategy.all_reduce(tensor)
    return task.evaluation(part, sums, layers)


def _add_use(layers: dict[str, LayerUse], model: nn.Module, labels: Tensor, num_classes: int) -> None:
    for name, layer in moe_layers(model):
        if (routing := take_routing(layer)) is not None:
            use = LayerUse.of(routing, labels, num_classes)
            layers[name] = layers[name] + use if name in layers else use
