"""Imports of optional libraries, with an error that says how to install them."""

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Args:
        module: Dotted name, such as `"PIL.Image"`.
        extra: The extra of gatewright that installs it, such as `"train"`.

    Raises:
        ImportError: If the module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        # A module that is there but misses one of its own dependencies must not send people to the wrong install.
        if error.name is None or not (module == error.name or module.startswith(f"{error.name}.")):
            raise
        message = f"{module} is not installed and is needed here: pip install 'gatewright[{extra}]'"
        raise ImportError(message, name=module) from error
