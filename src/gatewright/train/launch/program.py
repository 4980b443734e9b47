"""What to type to call this program again."""

import shlex
import shutil
import sys
from pathlib import Path


def program() -> str:
    """Return ``gatewright`` where a shell finds it, else the path or the interpreter by which it was started."""
    if shutil.which("gatewright"):
        return "gatewright"
    if Path(sys.argv[0]).name == "gatewright":
        return shlex.quote(sys.argv[0])
    return f"{shlex.quote(sys.executable)} -m gatewright"
