"""A lock between processes, which the system releases however the process that holds it ends."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from gatewright.extras import require


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock, and say whether it could be had; on a network drive that knows no locks go on without one.

    Args:
        file: File that the lock is on; it is made where there is none.
        wait: Whether to wait while another process holds it.
    """
    filelock = require("filelock", "train")
    lock = filelock.FileLock(file)
    held = True
    try:
        lock.acquire(timeout=-1 if wait else 0)
    except filelock.Timeout:
        held = False
    except NotImplementedError:
        pass
    try:
        yield held
    finally:
        lock.release()
