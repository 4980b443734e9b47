"""A trained model from a run's folder, ready to evaluate or predict; the data set is not needed."""

import sys
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from gatewright.models import ImageClassifier
from gatewright.parallel import whole_state
from gatewright.train.config import RunConfig, load_config
from gatewright.train.engine import load_weights
from gatewright.train.folder import newest_intact


@dataclass(frozen=True)
class Trained:
    """A trained model and what it was trained for.

    Args:
        config: The run.
        model: In evaluation mode, with averaged weights where the run kept them.
        class_names: In the order of the logits.
        image_shape: ``(channels, height, width)``.
    """

    config: RunConfig
    model: nn.Module
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]


def load_run(output: Path) -> Trained:
    """Load the newest checkpoint of a run.

    Raises:
        FileNotFoundError: If the folder holds no run, or no checkpoint yet.
        ValueError: If config or checkpoint are broken, or do not belong together.
    """
    config = load_config(output / "config.yaml")
    state, damaged = newest_intact(output / "checkpoints")
    if state is None:
        raise FileNotFoundError(f"The run at {output} has no checkpoint yet. Go on with it by train --resume.")
    for path in damaged:
        step = state["engine"]["step_count"]
        print(f"warning: {path} is damaged; this is the model of step {step}.", file=sys.stderr)
    channels, height, width = state["image_shape"]
    class_names = tuple(state["class_names"])
    network = config.model.build((channels, height, width), len(class_names))
    model = ImageClassifier(network, [0.0] * channels, [1.0] * channels)
    try:
        load_weights(model, whole_state(state["engine"]["average"] or state["engine"]["model"]))
    except ValueError as error:
        raise ValueError(f"{output}: {error}") from error
    return Trained(config, model.eval(), class_names, (channels, height, width))
