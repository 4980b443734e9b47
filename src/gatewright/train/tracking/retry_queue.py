"""A bounded queue and the one thread that empties it, so that training never waits for a server."""

import logging
import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping
from itertools import islice, takewhile
from typing import Any

logger = logging.getLogger("gatewright")

CAPACITY = 50_000
LINGER_SECONDS = 1.0
FIRST_DELAY_SECONDS = 0.5
LAST_DELAY_SECONDS = 30.0
# At close: how long to go on asking a server that is away, and how long to wait for one that takes its time.
AWAY_SECONDS = 5.0
BUSY_SECONDS = 60.0

Item = tuple[str, Any]


class RetryQueue:
    """A bounded queue of (kind, payload) and the one thread that empties it, batch by batch.

    Args:
        send: Delivers payloads of one kind, or raises an error.
        destination: Name of the other side in warnings.
        limits: Largest number of payloads of a kind in one request; 1 of a kind that is not in it.
        is_refusal: Whether an error stays the same however often one asks, so that asking again would only hold up the
            rest.
    """

    def __init__(
        self,
        send: Callable[[str, list[Any]], None],
        destination: str,
        *,
        limits: Mapping[str, int],
        is_refusal: Callable[[Exception], bool],
    ) -> None:
        self._send, self._destination, self._limits, self._is_refusal = send, destination, limits, is_refusal
        self._items: deque[Item] = deque()
        self._changed = threading.Condition()
        self._closing = threading.Event()
        self._give_up_at = math.inf
        self._lost: Counter[str] = Counter()
        self._num_suspects = 0
        self._warned: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="gatewright-tracking", daemon=True)
        self._thread.start()

    def put(self, kind: str, payloads: Iterable[Any]) -> None:
        """Queue payloads and return at once; what finds no room is counted as lost."""
        items = [(kind, payload) for payload in payloads]
        with self._changed:
            room = max(0, CAPACITY - len(self._items))
            self._items.extend(items[:room])
            self._lost[kind] += len(items[room:])
            self._changed.notify()

    def close(self, *last: Item) -> Counter[str]:
        """Queue the last items, wait a bounded time, and return how many of each kind were not delivered."""
        with self._changed:
            self._items.extend(last)
            self._give_up_at = time.monotonic() + AWAY_SECONDS
            self._closing.set()
            self._changed.notify()
        self._thread.join(BUSY_SECONDS)
        with self._changed:
            return self._lost + Counter(kind for kind, _ in self._items)

    def _run(self) -> None:
        delay = FIRST_DELAY_SECONDS
        while batch := self._next_batch():
            try:
                self._send(batch[0][0], [payload for _, payload in batch])
            except Exception as error:
                if self._is_refusal(error):
                    self._refused(batch, error)
                    continue
                self._failed(batch, error)
                if not self._back_off(delay):
                    return
                delay = min(2 * delay, LAST_DELAY_SECONDS)
            else:
                self._remove(batch)
                delay = FIRST_DELAY_SECONDS

    def _next_batch(self) -> list[Item]:
        """Wait for items and return the first ones of one kind, leaving them queued; none once closed and empty."""
        with self._changed:
            was_empty = not self._items
            self._changed.wait_for(lambda: self._items or self._closing.is_set())
        if was_empty:
            # A second more brings more items along and costs fewer requests.
            self._closing.wait(LINGER_SECONDS)
        with self._changed:
            if not self._items:
                return []
            kind = self._items[0][0]
            limit = 1 if self._num_suspects else self._limits.get(kind, 1)
            return list(islice(takewhile(lambda item: item[0] == kind, self._items), limit))

    def _remove(self, batch: list[Item]) -> None:
        with self._changed:
            self._num_suspects = max(0, self._num_suspects - len(batch))
            for _ in batch:
                self._items.popleft()

    def _refused(self, batch: list[Item], error: Exception) -> None:
        """Drop a refused item; of a refused batch, find those to blame by sending one at a time."""
        if len(batch) > 1:
            self._num_suspects = len(batch)
            return
        kind = batch[0][0]
        self._lost[kind] += 1
        self._remove(batch)
        self._warn_once("refusal", f"{self._destination} refused some {kind}: {error}")

    def _failed(self, batch: list[Item], error: Exception) -> None:
        if batch[0][0] == "files":
            # The store of files may be down, or out of reach from here, while the store of metrics is well.
            with self._changed:
                self._items.rotate(-1)
        self._warn_once(
            "failure",
            f"Logging to {self._destination} fails ({reason(error)}). "
            "Training and metrics.jsonl go on, and it is tried again in the background.",
        )

    def _back_off(self, delay: float) -> bool:
        """Wait, and say whether to try again."""
        if self._closing.wait(delay):
            time.sleep(FIRST_DELAY_SECONDS)
        return time.monotonic() < self._give_up_at

    def _warn_once(self, topic: str, sentence: str) -> None:
        if topic not in self._warned:
            self._warned.add(topic)
            logger.warning("%s", sentence)


def reason(error: BaseException) -> str:
    """Say in one line why a request failed; a client may wrap `Connection refused` in several exceptions of its own."""
    cause = error
    while (deeper := cause.__cause__ or cause.__context__) is not None:
        cause = deeper
    return str(cause if isinstance(cause, OSError) else error).partition("\n")[0]
