"""A vision transformer for small images, whose feed-forward layers are mixtures of experts, routed per patch."""

from dataclasses import replace

import torch
from jaxtyping import Float
from pydantic import NonNegativeInt, PositiveInt
from torch import Tensor, nn

from gatewright.models.blocks import Block, BlocksConfig
from gatewright.settings import settings

PATCH = 4


@settings("model")
class VitConfig(BlocksConfig):
    """A vision transformer (https://arxiv.org/abs/2010.11929) behind a convolutional stem.

    A token is a patch of 4 x 4 pixels, and its key, which hashes look at, is its place in the image.

    Args:
        dense_layers: Number of blocks, the first ones, whose feed-forward layers are dense.
        stem: Channels of the stem's first convolution (https://arxiv.org/abs/2106.14881).
    """

    dense_layers: NonNegativeInt = 0
    stem: PositiveInt = 48

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dense_layers >= self.num_layers:
            raise ValueError(
                "`model.dense_layers` is below `model.num_layers`, so that a mixture is left; got "
                f"{self.dense_layers} and {self.num_layers}. For the dense twin use num_experts=1."
            )

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Make the network for images of a shape ``(channels, height, width)``."""
        return Vit(self, image_shape, num_classes)

    def of_block(self, place: int) -> "VitConfig":
        """Return the settings of the block at a place."""
        if place < self.dense_layers:
            return replace(self, num_experts=1, top_k=1)
        return super().of_block(place)


class Vit(nn.Module):
    """Cut images into patches, mix these in blocks, and classify their mean.

    Args:
        config: Sizes and mixture; one expert makes the dense twin.
        image_shape: ``(channels, height, width)``, sides of multiples of 4.
        num_classes: Number of classes.

    Raises:
        ValueError: If a side is no multiple of 4.
    """

    def __init__(self, config: VitConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        if height % PATCH or width % PATCH:
            raise ValueError(
                f"The vision transformer cuts images into patches of {PATCH} x {PATCH} pixels; got images of "
                f"{height} x {width}. Set data.image_size to a multiple of {PATCH}."
            )
        num_patches = (height // PATCH) * (width // PATCH)
        self.stem = nn.Sequential(
            nn.Conv2d(channels, config.stem, 3, padding=1, bias=False),
            nn.BatchNorm2d(config.stem),
            nn.GELU(),
            nn.Conv2d(config.stem, config.dim, 3, 2, padding=1, bias=False),
            nn.BatchNorm2d(config.dim),
            nn.GELU(),
            nn.Conv2d(config.dim, config.dim, 2, 2),
        )
        self.positions = nn.Embedding(num_patches, config.dim)
        self.blocks = nn.ModuleList(Block(config.of_block(place), num_patches) for place in range(config.num_layers))
        self.norm = nn.RMSNorm(config.dim)
        self.head = nn.Linear(config.dim, num_classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of standardised images."""
        patches = self.stem(images).flatten(2).mT
        places = torch.arange(patches.shape[1], device=patches.device)
        x, keys = patches + self.positions(places), places.expand(patches.shape[0], -1)
        for block in self.blocks:
            x = block(x, keys, None)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits
