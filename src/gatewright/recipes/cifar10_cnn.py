"""CIFAR-10 with the article's first network: its CNN, with 8 experts in place of fc3, and its dense twin."""

from dataclasses import replace

from gatewright.data import AugmentConfig, DataConfig
from gatewright.models import CnnConfig
from gatewright.train import OptimConfig, RunConfig


def cifar10_cnn() -> RunConfig:
    """Eight linear experts that begin as copies of one, Shazeer's noisy top-2 gate.

    Test accuracy 70.38 % ± 0.38 over seeds 0, 1, 2; 138 to 155 s each.
    Two cores of an AMD EPYC (Zen 4), torch 2.13.0 on CPU, the JPEG copy of CIFAR-10; measured before the dense network
    that the experts are copies of drew initial weights of its own, and not repeated since.
    """
    return RunConfig(
        recipe="cifar10-cnn",
        model=CnnConfig(num_experts=8, top_k=2, upcycle_epoch=8),
        data=DataConfig(name="cifar10", holdout=0.05, batch_size=256, augment=AugmentConfig(flip=True, translate=1)),
        optim=OptimConfig(lr=5e-3, weight_decay=0.01, warmup_epochs=1),
        epochs=24,
    )


def cifar10_cnn_dense() -> RunConfig:
    """The dense twin: one linear layer in place of the mixture.

    Test accuracy 69.78 % ± 0.80 over seeds 0, 1, 2; 114 to 123 s each.
    Two cores of an AMD EPYC (Zen 4) that a test suite used too, so the times are upper bounds; torch 2.13.0 on CPU; the
    JPEG copy of CIFAR-10.
    """
    return replace(cifar10_cnn(), recipe="cifar10-cnn-dense", model=CnnConfig(num_experts=1))
