"""Engines on networks of a few hundred parameters."""

from itertools import islice

from torch import nn

from gatewright.data import DataConfig
from gatewright.models import DigitsConfig, ImageClassifier
from gatewright.train import OptimConfig, RunConfig, TrackingConfig
from tests.train.runs import batches_of, image_set, make_engine

IMAGES = image_set(48, channels=1, size=8)


DENSE = DigitsConfig(num_experts=1, width=8)


MIXTURE = DigitsConfig(num_experts=3, top_k=2, width=8)


SGD = OptimConfig(name="sgd", lr=0.1, momentum=0.0, weight_decay=0.0, schedule="constant")


def config(model=DENSE, optim=SGD, **changes):
    return RunConfig(
        recipe="test",
        model=model,
        data=DataConfig(),
        optim=optim,
        tracking=TrackingConfig(enabled=False),
        device="cpu",
        **changes,
    )


def classifier(model=DENSE, image_shape=(1, 8, 8)):
    return ImageClassifier(model.build(image_shape, 4), [0.5] * image_shape[0], [0.25] * image_shape[0])


def linear():
    """A network without randomness and without batch statistics."""
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.Tanh(), nn.Linear(16, 4))


def engine_for(model_config=DENSE, optim=SGD, *, model=None, **changes):
    return make_engine(classifier(model_config) if model is None else model, config(model_config, optim, **changes))


def train_for(engine, steps, *, batch_size=16, images=IMAGES):
    losses = [engine.step([batch]).task_loss for batch in islice(batches_of(images, batch_size), steps)]
    engine.check_finite()
    return [loss.item() for loss in losses]


def weights(model):
    return {name: value.detach().clone() for name, value in model.named_parameters()}
