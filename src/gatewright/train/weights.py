"""Loading the weights of a model, with an error that says what does not fit."""

from torch import Tensor, nn


def load_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load a model's state.

    Raises:
        ValueError: If names or shapes are another model's.
    """
    if any(name.endswith("mixture._extra_state") for name in weights):
        raise ValueError(
            "The checkpoint is of an earlier version, in which experts that begin as one network were part of the "
            "mixture. Go on with that version, or begin the run again."
        )
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        first = str(error).splitlines()[1:2] or [str(error)]  # below torch's heading
        raise ValueError(
            f"The checkpoint holds another model than this config describes: {first[0].strip()}"
        ) from error
