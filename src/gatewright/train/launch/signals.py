"""Ctrl-C and SIGTERM ask a run to stop at the next step; the run saves and says how to resume."""

import signal
import threading
from types import FrameType
from typing import Any, Self

STOPPING = (signal.SIGINT, signal.SIGTERM)


class Interrupted(Exception):  # noqa: N818 - a request to stop, not an error
    """The run was asked to stop by a signal, and saved itself; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.signal_number = signal_number


class StopRequest:
    """While it is entered, remembers a signal instead of dying of it; a second one kills as usual."""

    def __init__(self) -> None:
        self.signal_number: int | None = None

    def __enter__(self) -> Self:
        # Python lets only the main thread set handlers; a run in another thread is stopped by its owner.
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._remember) for number in STOPPING}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        self.signal_number = number
        signal.signal(number, self._previous[number])
