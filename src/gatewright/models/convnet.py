"""A small convolutional network that trains fast, with mixtures in its last blocks."""

import math
from functools import partial

import torch
from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from gatewright.models.mixture import MixtureConfig
from gatewright.models.resnets import gate_features
from gatewright.settings import settings

BLOCKS = 3
SMALLEST = 2**BLOCKS
"""Side of the images that are one pixel too small: a side loses one pixel, and is halved in every block."""


@settings("model")
class ConvNetConfig(MixtureConfig):
    """Three blocks of two convolutions behind fixed filters, after airbench (https://arxiv.org/abs/2404.00498).

    Whole blocks are experts, to which images are sent; or with ``experts="merged"`` the filters of single convolutions
    are mixed for each image, as in CondConv (https://arxiv.org/abs/1904.04971).

    Args:
        widths: Channels of the three blocks.
        mixture_blocks: Number of blocks, the last ones, that are mixtures.
        gate_size: Number of features of the router's own small network, which only the router sees.
    """

    widths: tuple[PositiveInt, PositiveInt, PositiveInt] = (32, 128, 128)
    mixture_blocks: PositiveInt = 2
    gate_size: PositiveInt = 64

    def __post_init__(self) -> None:
        if self.mixture_blocks > BLOCKS:
            raise ValueError(f"`model.mixture_blocks` is at most {BLOCKS}; got {self.mixture_blocks}.")

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Make the network for images of a shape ``(channels, height, width)``."""
        return ConvNet(self, image_shape, num_classes)


class ConvNet(nn.Module):
    """Fixed filters that decorrelate 2x2 patches, three blocks, a maximum over places and a linear layer.

    Args:
        config: Widths and mixtures; one expert makes the dense twin.
        image_shape: ``(channels, height, width)``.
        num_classes: Number of classes.

    Raises:
        ValueError: If images are too small to be pooled three times.
    """

    def __init__(self, config: ConvNetConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) <= SMALLEST:
            raise ValueError(
                f"The convolutional network takes images of more than {SMALLEST} x {SMALLEST} pixels; got {height} x "
                f"{width}. Set data.image_size."
            )
        self.stem = PatchStem(channels)
        channels, height, width = self.stem.out_channels, height - 1, width - 1
        blocks: list[nn.Module] = []
        for place, wide in enumerate(config.widths):
            if place < BLOCKS - config.mixture_blocks:
                blocks.append(ConvBlock(channels, wide))
            elif config.experts == "merged":
                blocks.append(MergedBlock(config, channels, wide, (height, width)))
            else:
                blocks.append(RoutedBlock(config, channels, wide, (height, width)))
            channels, height, width = wide, height // 2, width // 2
        self.blocks = nn.Sequential(*blocks)
        self.head = nn.Linear(channels, num_classes, bias=False)
        self.scale = 1 / math.sqrt(channels)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of standardised images."""
        logits: Tensor = self.head(self.blocks(self.stem(images)).amax((-2, -1)))
        return logits * self.scale


class PatchStem(nn.Module):
    """Decorrelate 2x2 patches by fixed filters, each output of variance 1 and twice: as it is and with its sign turned.

    The filters are sums and differences over places (Hadamard's) times those over colours (grey, red against blue,
    green against both), near the principal components of natural images; BatchNorm makes their variances 1.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        places = torch.tensor([[1, 1, 1, 1], [1, 1, -1, -1], [1, -1, 1, -1], [1, -1, -1, 1]]) / 2
        colours = torch.tensor([[1.0, 1, 1], [1, 0, -1], [1, -2, 1]]) if channels == 3 else torch.eye(channels)
        filters = torch.einsum("fc,gp->fgcp", nn.functional.normalize(colours, dim=1), places)
        self.register_buffer("filters", filters.reshape(4 * channels, channels, 2, 2), persistent=False)
        self.norm = nn.BatchNorm2d(4 * channels, affine=False)
        self.bias = nn.Parameter(torch.zeros(8 * channels, 1, 1))
        self.out_channels = 8 * channels

    filters: Tensor

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch out h w"]:
        """Return the filtered images, one pixel less on each side."""
        x = self.norm(nn.functional.conv2d(images, self.filters.to(images.dtype)))
        return nn.functional.gelu(torch.cat([x, -x], dim=1) + self.bias.to(x.dtype))


class ConvBlock(nn.Sequential):
    """Two 3x3 convolutions, the first one pooled, each with BatchNorm and GELU."""

    def __init__(self, in_channels: int, channels: int) -> None:
        super().__init__(
            _conv(in_channels, channels),
            nn.MaxPool2d(2),
            nn.BatchNorm2d(channels),
            nn.GELU(),
            _conv(channels, channels),
            nn.BatchNorm2d(channels),
            nn.GELU(),
        )


class RoutedBlock(nn.Module):
    """A mixture of whole blocks, routed per image by a small network of the router's own; or one block for all."""

    def __init__(self, config: ConvNetConfig, in_channels: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.router_features = gate_features(in_channels, config.gate_size) if config.num_experts > 1 else None
        self.mixture = config.build_mixture(
            partial(ConvBlock, in_channels, channels), router_dim=config.gate_size, item_shape=(in_channels, *size)
        )

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch channels h w"]:
        """Send every image to its blocks."""
        y: Tensor = self.mixture(x) if self.router_features is None else self.mixture(x, self.router_features(x))
        return y


class MergedBlock(nn.Module):
    """A block whose two convolutions have filters mixed for each image by a router; or one filter for all."""

    def __init__(self, config: ConvNetConfig, in_channels: int, channels: int, size: tuple[int, int]) -> None:
        super().__init__()
        self.router_features = gate_features(in_channels, config.gate_size) if config.num_experts > 1 else None
        shapes = (in_channels, *size), (channels, size[0] // 2, size[1] // 2)
        self.mixtures = nn.ModuleList(
            config.build_mixture(partial(_conv, shape[0], channels), router_dim=config.gate_size, item_shape=shape)
            for shape in shapes
        )
        self.pool, self.norms = nn.MaxPool2d(2), nn.ModuleList(nn.BatchNorm2d(channels) for _ in shapes)

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch channels h w"]:
        """Run both convolutions, with each image's own filters where there are several."""
        seen = () if self.router_features is None else (self.router_features(x),)
        first, second = self.mixtures
        x = nn.functional.gelu(self.norms[0](self.pool(first(x, *seen))))
        return nn.functional.gelu(self.norms[1](second(x, *seen)))


def _conv(in_channels: int, channels: int) -> nn.Conv2d:
    conv = nn.Conv2d(in_channels, channels, 3, padding=1, bias=False)
    with torch.no_grad():  # the first filters begin as the identity, as in airbench
        nn.init.dirac_(conv.weight[: min(in_channels, channels)])
    return conv
