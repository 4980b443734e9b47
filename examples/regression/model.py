"""The model: a linear layer, a mixture of small networks, and a linear layer to one number."""

from collections.abc import Callable

from jaxtyping import Float
from torch import Tensor, nn

from gatewright.models import MixtureConfig
from gatewright.settings import settings


@settings("model")
class RegressorConfig(MixtureConfig):
    """The settings of a regressor: those of its mixture, and its width.

    Args:
        width: Features between the layers.
    """

    width: int = 32

    def build(self, num_columns: int) -> "Regressor":
        """Make the model for tables of so many columns."""
        return Regressor(self, num_columns)


class Regressor(nn.Module):
    """Predict a number from the columns of a row.

    Args:
        config: The settings.
        num_columns: The number of columns.
    """

    def __init__(self, config: RegressorConfig, num_columns: int) -> None:
        super().__init__()
        width = config.width
        self.first = nn.Linear(num_columns, width)
        self.mixture = config.build_mixture(_expert(width), router_dim=width, item_shape=(width,))
        self.last = nn.Linear(width, 1)

    def forward(self, rows: Float[Tensor, "rows columns"]) -> Float[Tensor, " rows"]:
        """Return a number for each row."""
        hidden = self.first(rows).relu()
        prediction: Tensor = self.last(hidden + self.mixture(hidden)).squeeze(1)
        return prediction


def _expert(width: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, width))
