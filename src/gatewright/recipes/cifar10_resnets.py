"""CIFAR-10 with the article's second network: a gate over whole residual networks, routed per image."""

from dataclasses import replace

from gatewright.data import AugmentConfig, DataConfig
from gatewright.models import ResNetsConfig
from gatewright.train import OptimConfig, RunConfig

_MODEL = ResNetsConfig(
    num_experts=4,
    top_k=2,
    router="top-k",
    router_options={"score_after_top_k": True},
    losses={"load_balance": 0.02},
    upcycle_epoch=3,
)


def cifar10_resnets() -> RunConfig:
    """Four small residual networks without a shared stem; two of them see each image.

    Test accuracy 80.61 % ± 0.24 over seeds 0, 1, 2; 514 to 2604 s each. One thread of an Intel Xeon that other work
    used too, torch 2.13.0 on CPU, the JPEG copy of CIFAR-10. On 2 cores of an AMD EPYC (Zen 4) it took 321 to 344 s.
    """
    return RunConfig(
        recipe="cifar10-resnets",
        model=_MODEL,
        data=DataConfig(name="cifar10", holdout=0.05, batch_size=256, augment=AugmentConfig(flip=True, translate=3)),
        optim=OptimConfig(
            name="sgd", lr=0.2, weight_decay=5e-4, warmup_epochs=1, schedule="linear", label_smoothing=0.1
        ),
        epochs=5,
        precision="bfloat16",
    )


def cifar10_resnets_dense() -> RunConfig:
    """The dense twin: one residual network for all images.

    Test accuracy 81.41 % ± 0.07 over seeds 0, 1, 2; 416 to 542 s each. One thread of an Intel Xeon that other work
    used too, torch 2.13.0 on CPU, the JPEG copy of CIFAR-10.
    """
    return _variant("cifar10-resnets-dense", replace(_MODEL, num_experts=1))


def cifar10_resnets_stem() -> RunConfig:
    """The experts share their first convolution and block; the router looks at what these see.

    Test accuracy 80.54 % with seed 0; 548 s. One thread of an Intel Xeon that other work used too, torch 2.13.0 on CPU,
    the JPEG copy of CIFAR-10.
    """
    return _variant("cifar10-resnets-stem", replace(_MODEL, stem_depth=2))


def cifar10_resnets_article() -> RunConfig:
    """The article's own residual network as experts, each emitting 3,072 numbers.

    Not measured yet. docs/article.md has forty of them on 4 processes beside the dense twin, which is
    `model.num_experts=1`.
    """
    return _variant("cifar10-resnets-article", replace(_MODEL, resnet="article", feature_size=3072))


def cifar10_resnet18s() -> RunConfig:
    """ResNet-18 as experts: for a GPU.

    Not measured yet. Its dense twin is `model.num_experts=1`.
    """
    return replace(_variant("cifar10-resnet18s", replace(_MODEL, resnet="resnet18")), epochs=30)


def cifar10_resnet34s() -> RunConfig:
    """ResNet-34 as experts: for a GPU.

    Not measured yet. Its dense twin is `model.num_experts=1`.
    """
    return replace(_variant("cifar10-resnet34s", replace(_MODEL, resnet="resnet34")), epochs=30)


def _variant(recipe: str, model: ResNetsConfig) -> RunConfig:
    return replace(cifar10_resnets(), recipe=recipe, model=model)
