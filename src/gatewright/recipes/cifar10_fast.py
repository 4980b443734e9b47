"""CIFAR-10 in few epochs: a small convolutional network, Muon, alternating flips."""

from dataclasses import replace

from gatewright.data import AugmentConfig, DataConfig
from gatewright.models import ConvNetConfig
from gatewright.train import OptimConfig, RunConfig


def cifar10_fast() -> RunConfig:
    """Convolutions whose filters are mixed for each image.

    Not measured yet.
    """
    return RunConfig(
        recipe="cifar10-fast",
        model=ConvNetConfig(
            num_experts=4,
            top_k=4,
            experts="merged",
            router="top-k",
            router_options={"score": "softmax"},
            losses={},
        ),
        data=DataConfig(
            name="cifar10", holdout=0.05, batch_size=512, augment=AugmentConfig(alternate_flip=True, translate=2)
        ),
        optim=OptimConfig(
            name="muon",
            lr=0.1,
            adam_lr=5e-3,
            momentum=0.8,
            weight_decay=0.05,
            schedule="linear",
            warmup_epochs=0.5,
            label_smoothing=0.2,
        ),
        epochs=10,
        precision="bfloat16",
    )


def cifar10_fast_dense() -> RunConfig:
    """The dense twin: one filter for all images.

    Not measured yet.
    """
    config = cifar10_fast()
    return replace(config, recipe="cifar10-fast-dense", model=replace(config.model, num_experts=1))


def cifar10_rotate() -> RunConfig:
    """The same where every image is turned by 0, 90, 180 or 270 degrees: ten classes, whichever way up.

    Not measured yet.
    """
    turned = AugmentConfig(rotate=True, translate=2)
    data = DataConfig(name="cifar10", holdout=0.05, batch_size=512, rotate=True, augment=turned)
    return replace(cifar10_fast(), recipe="cifar10-rotate", data=data)


def cifar10_rotate_dense() -> RunConfig:
    """The dense twin: one filter for all images.

    Not measured yet.
    """
    config = cifar10_rotate()
    return replace(config, recipe="cifar10-rotate-dense", model=replace(config.model, num_experts=1))
