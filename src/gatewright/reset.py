"""Initialisation a second time: what construction drew, drawn for parameters that had no memory then."""

from torch import nn


def reset_parts(module: nn.Module) -> None:
    """Initialise everything below a module as construction did, in the order in which it was registered.

    A part with a ``reset_parameters`` of its own, as torch's layers have it, answers for all that is below it.

    Raises:
        ValueError: If a part holds parameters or buffers and has no such method.
    """
    for name, part in module.named_children():
        if callable(own := getattr(part, "reset_parameters", None)):
            own()
        else:
            refuse_unknown_start(name, part)
            reset_parts(part)


def refuse_unknown_start(name: str, module: nn.Module) -> None:
    """Refuse a module whose own tensors nothing initialises again.

    Raises:
        ValueError: If it holds parameters or buffers itself.
    """
    held = [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
    if held:
        raise ValueError(
            f"A module that holds tensors has a reset_parameters method, which initialises them; {name} "
            f"({type(module).__name__}) holds {', '.join(held)} and has none. Add the method, or load a state dict."
        )
