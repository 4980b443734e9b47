"""Residual networks for small images, as lists of parts that can be split between a shared stem and experts."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn


@dataclass(frozen=True)
class ResNetShape:
    """What a residual network is made of.

    Args:
        first: Channels, kernel, stride and padding of the first convolution.
        blocks: Channels and stride of each basic block, in order.
        pooled_shortcut: Whether a strided block's shortcut is average-pooled before its 1x1 convolution (ResNet-D,
            https://arxiv.org/abs/1812.01187), instead of the convolution being strided.
    """

    first: tuple[int, int, int, int]
    blocks: tuple[tuple[int, int], ...]
    pooled_shortcut: bool = False

    @property
    def width(self) -> int:
        """Channels of the last block, which are the features."""
        return self.blocks[-1][0]

    def parts(self, in_channels: int) -> list[nn.Module]:
        """Make the first convolution and the blocks."""
        channels, kernel, stride, padding = self.first
        first = nn.Conv2d(in_channels, channels, kernel, stride, padding, bias=False)
        made: list[nn.Module] = [nn.Sequential(first, nn.BatchNorm2d(channels), nn.ReLU())]
        for width, block_stride in self.blocks:
            made.append(BasicBlock(channels, width, block_stride, pooled_shortcut=self.pooled_shortcut))
            channels = width
        return made


class BasicBlock(nn.Module):
    """Two 3x3 convolutions with BatchNorm and a shortcut: https://arxiv.org/abs/1512.03385 figure 5, left."""

    def __init__(self, in_channels: int, channels: int, stride: int, *, pooled_shortcut: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.shortcut = nn.Sequential()
        if stride != 1 or in_channels != channels:
            pool = nn.AvgPool2d(stride, ceil_mode=True) if pooled_shortcut and stride > 1 else nn.Identity()
            rest = 1 if pooled_shortcut else stride
            conv = nn.Conv2d(in_channels, channels, 1, rest, bias=False)
            self.shortcut = nn.Sequential(pool, conv, nn.BatchNorm2d(channels))

    def forward(self, x: Float[Tensor, "batch in_channels height width"]) -> Float[Tensor, "batch channels h w"]:
        """Add what the convolutions make of the input to the input itself."""
        residual = self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))
        return F.relu(residual + self.shortcut(x))


def _stages(*stages: tuple[int, int]) -> tuple[tuple[int, int], ...]:
    """Blocks of stages of (channels, number), each but the first halving the image in its first block."""
    return tuple(
        (channels, 2 if index > 0 and block == 0 else 1)
        for index, (channels, number) in enumerate(stages)
        for block in range(number)
    )


RESNETS: Mapping[str, ResNetShape] = MappingProxyType(
    {
        # Three blocks, 0.47 M parameters: what trains on two CPU cores in minutes.
        "small": ResNetShape((32, 3, 1, 1), ((64, 2), (96, 2), (128, 2)), pooled_shortcut=True),
        # The article's, which its files call ResNet34: the stride sits on each stage's second block.
        "article": ResNetShape(
            (64, 2, 2, 3), ((64, 1), (64, 2), (128, 1), (128, 2), (256, 1), (256, 2), (512, 1), (512, 2))
        ),
        # He et al. 2015 with the usual first layer for 32x32 images: 3x3, no pooling.
        "resnet18": ResNetShape((64, 3, 1, 1), _stages((64, 2), (128, 2), (256, 2), (512, 2))),
        "resnet34": ResNetShape((64, 3, 1, 1), _stages((64, 3), (128, 4), (256, 6), (512, 3))),
    }
)
"""Residual networks by name."""
