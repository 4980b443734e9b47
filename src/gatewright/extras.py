"""Optional libraries, with an error that says how to install one that is missing."""

import importlib
import importlib.util
from pathlib import Path
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
        raise _missing(module, extra) from error


def folder_of(package: str, extra: str) -> Path:
    """Return the folder of an optional package without importing it, or say which extra brings it.

    Raises:
        ImportError: If the package is not installed.
    """
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise _missing(package, extra)
    return Path(found.origin).parent


def _missing(module: str, extra: str) -> ImportError:
    return ImportError(f"{module} is not installed and is needed here: pip install 'gatewright[{extra}]'", name=module)
