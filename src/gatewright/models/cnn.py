"""The article's first network: a small CNN with a mixture of linear experts in place of a fully connected layer."""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from gatewright.models.mixture import MixtureConfig
from gatewright.settings import settings


@settings("model")
class CnnConfig(MixtureConfig):
    """Two 5x5 convolutions of 6 and 16 channels, layers of 120 and 84, the mixture of 84 x 84 layers, the classes."""

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Make the network for images of a shape ``(channels, height, width)``."""
        return Cnn(self, image_shape, num_classes)


class Cnn(nn.Module):
    """The CNN of PyTorch's CIFAR-10 tutorial, with experts in place of its third fully connected layer.

    Args:
        config: The mixture; one expert makes the dense twin.
        image_shape: ``(channels, height, width)``, at least 16 x 16.
        num_classes: Number of classes.

    Raises:
        ValueError: If images are too small for two 5x5 convolutions and poolings.
    """

    def __init__(self, config: MixtureConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < 16:
            raise ValueError(f"The CNN takes images of at least 16 x 16 pixels; got {height} x {width}.")
        self.conv1 = nn.Conv2d(channels, 6, 5)
        self.conv2 = nn.Conv2d(6, 16, 5)
        self.fc1 = nn.Linear(16 * _left(height) * _left(width), 120)
        self.fc2 = nn.Linear(120, 84)
        self.mixture = config.build_mixture(lambda: nn.Linear(84, 84), router_dim=84, item_shape=(84,))
        self.fc4 = nn.Linear(84, num_classes)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of standardised images."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2).flatten(1)
        x = F.relu(self.fc2(F.relu(self.fc1(x))))
        logits: Tensor = self.fc4(self.mixture(x))
        return logits


def _left(pixels: int) -> int:
    """Pixels left of a side after two rounds of 5x5 convolution without padding and 2x2 pooling."""
    return ((pixels - 4) // 2 - 4) // 2
