"""Files that appear under their name only when they are complete."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4


@contextlib.contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a path beside a file to write to, and move what was written there into the file's place.

    Other processes see the old file or the new one and never a part of it, and after an error the old one is as it was.
    The path is another one in every call, so that several processes may write the same file at once. A process that is
    killed while it writes leaves a file that ends in ``.partial``.
    """
    partial = path.with_name(f"{path.name}.{uuid4().hex}.partial")
    try:
        yield partial
        partial.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
