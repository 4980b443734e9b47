"""An image classifier: whatever network, fed standardised images."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor, nn


class ImageClassifier(nn.Module):
    """Standardise images per channel, then classify them.

    The statistics are buffers, so a checkpoint holds all that a prediction needs.

    Args:
        network: Maps standardised images to logits.
        mean: Mean per channel of the training images, in [0, 1].
        std: Standard deviation per channel.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, network: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("mean", torch.tensor(mean).reshape(-1, 1, 1))
        self.register_buffer("std", torch.tensor(std).reshape(-1, 1, 1))

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of images with values in [0, 1], computed in the network's own type."""
        standardised = (images - self.mean) / self.std
        dtype = next((parameter.dtype for parameter in self.network.parameters()), standardised.dtype)
        logits: Tensor = self.network(standardised.to(dtype))
        return logits
