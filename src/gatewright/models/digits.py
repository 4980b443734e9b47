"""A small CNN for 8x8 digits whose head is a mixture of experts."""

from jaxtyping import Float
from pydantic import PositiveInt
from torch import Tensor, nn

from gatewright.models.mixture import MixtureConfig
from gatewright.settings import settings


@settings("model")
class DigitsConfig(MixtureConfig):
    """Two 3x3 convolutions, then a mixture of two-layer heads.

    Args:
        width: Channels of the convolutions, and size of an expert's hidden layer.
    """

    num_experts: PositiveInt = 4
    width: PositiveInt = 32

    def build(self, image_shape: tuple[int, int, int], num_classes: int) -> nn.Module:
        """Make the network for images of a shape ``(channels, height, width)``."""
        return DigitsCnn(self, image_shape, num_classes)


class DigitsCnn(nn.Module):
    """Convolutions shared by all images, and one mixture of heads that emits the logits.

    Args:
        config: The mixture and the width; one expert makes the dense twin.
        image_shape: ``(channels, height, width)``.
        num_classes: Number of classes.

    Raises:
        ValueError: If images are too small to be pooled.
    """

    def __init__(self, config: DigitsConfig, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        if min(height, width) < 2:
            raise ValueError(f"The digits' CNN takes images of at least 2 x 2 pixels; got {height} x {width}.")
        size = config.width
        self.features = nn.Sequential(
            nn.Conv2d(channels, size, 3, padding=1),
            nn.BatchNorm2d(size),
            nn.ReLU(),
            nn.Conv2d(size, size, 3, padding=1),
            nn.BatchNorm2d(size),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Flatten(),
        )
        dim = size * (height // 2) * (width // 2)
        self.mixture = config.build_mixture(
            lambda: nn.Sequential(nn.Linear(dim, size), nn.ReLU(), nn.Linear(size, num_classes)),
            router_dim=dim,
            item_shape=(dim,),
        )

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Return the logits of standardised images."""
        logits: Tensor = self.mixture(self.features(images))
        return logits
