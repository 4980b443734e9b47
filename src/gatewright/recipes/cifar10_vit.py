"""CIFAR-10 with a vision transformer whose feed-forward layers are mixtures, routed per patch."""

from dataclasses import replace

from gatewright.data import AugmentConfig, DataConfig
from gatewright.models import VitConfig
from gatewright.train import OptimConfig, RunConfig


def cifar10_vit() -> RunConfig:
    """Four layers of eight experts, two for each patch.

    Not measured yet.
    """
    return RunConfig(
        recipe="cifar10-vit",
        model=VitConfig(num_experts=8, top_k=2, router_options={"score_after_top_k": True}),
        data=DataConfig(name="cifar10", holdout=0.05, batch_size=256, augment=AugmentConfig(flip=True, translate=4)),
        optim=OptimConfig(
            lr=1e-3, weight_decay=0.1, betas=(0.9, 0.98), warmup_epochs=1, clip_norm=1.0, label_smoothing=0.1
        ),
        epochs=20,
        precision="bfloat16",
        channels_last=False,
    )


def cifar10_vit_dense() -> RunConfig:
    """The dense twin: in each layer one feed-forward of the same arithmetic per patch.

    Not measured yet.
    """
    config = cifar10_vit()
    return replace(config, recipe="cifar10-vit-dense", model=replace(config.model, num_experts=1))
