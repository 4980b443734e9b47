"""The article's second network: a gate over whole residual networks, each image sent to a few of them."""

import copy
from typing import Literal

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from gatewright.models.mixture import MixtureConfig
from gatewright.models.resnet import RESNETS
from gatewright.settings import settings


@settings("model")
class ResNetsConfig(MixtureConfig):
    """A mixture of residual networks, routed per image.

    Args:
        resnet: A name in `gatewright.models.RESNETS`: ``"small"``, ``"article"``, ``"resnet18"`` or ``"resnet34"``.
        emit: Output of the experts: ``"features"``, classified by one layer for all, or ``"logits"``.
        feature_size: Number of features per expert; None takes the network's own width. The article's experts emit
            3,072.
        stem_depth: Number of first parts (the first convolution, then blocks) that all experts share; 0 shares none.
        gate_size: Number of features of the router's own small network, which only the router sees.
    """

    resnet: Literal["small", "article", "resnet18", "resnet34"] = "small"
    emit: Literal["features", "logits"] = "features"
    feature_size: PositiveInt | None = None
    stem_depth: NonNegativeInt = 0
    gate_size: PositiveInt = 64

    def __post_init__(self) -> None:
        parts = 1 + len(RESNETS[self.resnet].blocks)
        if self.stem_depth >= parts:
            raise ValueError(
                f"`model.stem_depth` is between 0 and {parts - 1}, so that experts keep a part of {self.resnet}'s "
                f"{parts}; got {self.stem_depth}."
            )

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Make the network for images of a shape ``(channels, height, width)``."""
        return MixtureOfResNets(self, image_shape, num_classes)


class MixtureOfResNets(nn.Module):
    """Whole residual networks as experts: images are dispatched, and the router looks with a network of its own.

    Args:
        config: Networks, mixture and stem; one expert makes the dense twin.
        image_shape: ``(channels, height, width)``.
        num_classes: Number of classes.
    """

    def __init__(self, config: ResNetsConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        parts = RESNETS[config.resnet].parts(image_shape[0])
        self.stem = nn.Sequential(*parts[: config.stem_depth])
        item_shape = _shape_after(self.stem, image_shape)
        emitted = num_classes if config.emit == "logits" else config.feature_size or RESNETS[config.resnet].width
        self.mixture = config.build_mixture(
            lambda: _expert(config, image_shape[0], emitted), router_dim=config.gate_size, item_shape=item_shape
        )
        self.router_features: nn.Module | None = None
        if config.num_experts > 1:
            self.router_features = gate_features(item_shape[0], config.gate_size)
        self.classifier = nn.Identity() if config.emit == "logits" else nn.Linear(emitted, num_classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of standardised images."""
        x = self.stem(images)
        y = self.mixture(x) if self.router_features is None else self.mixture(x, self.router_features(x))
        logits: Tensor = self.classifier(y)
        return logits


def gate_features(in_channels: int, size: int) -> nn.Sequential:
    """Make the router's own network: three strided convolutions, pooled, each feature standardised over the batch.

    Raw pixels say little about where an image belongs; standardised features keep all experts' logits in one range.
    """
    layers: list[nn.Module] = []
    for channels in (16, 32, size):
        layers += [nn.Conv2d(in_channels, channels, 3, 2, 1, bias=False), nn.BatchNorm2d(channels), nn.ReLU()]
        in_channels = channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(size, affine=False))


def _expert(config: ResNetsConfig, in_channels: int, emitted: int) -> nn.Module:
    shape = RESNETS[config.resnet]
    parts = shape.parts(in_channels)[config.stem_depth :]
    as_they_are = config.emit == "features" and emitted == shape.width
    head = nn.Identity() if as_they_are else nn.Linear(shape.width, emitted)
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


def _shape_after(stem: nn.Sequential, image_shape: tuple[int, int, int]) -> tuple[int, ...]:
    meta = copy.deepcopy(stem).to("meta").eval()
    return tuple(meta(torch.empty(1, *image_shape, device="meta")).shape[1:])
