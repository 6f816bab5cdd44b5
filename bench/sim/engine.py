"""Virtual time: a heap of what happens when, and nothing else.

What is due at the same instant happens in the order in which it was asked for, so that a run with
the same seed is the same run. Times are milliseconds from the start as floats (messages take less
than one); ``now_ms`` is the reading that the core gets, whole Unix milliseconds.

``ends`` holds the requests that are being answered, in order of their ends, apart from the heap:
there are a hundred times more of them than of everything else, and all take equally long.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import deque
from collections.abc import Callable
from typing import Any, Final

# Where the virtual clock starts (any instant does, but 0 means "never" in the records).
EPOCH_MS: Final = 1_750_000_000_000

Event = tuple[float, int, Callable[..., None], tuple[Any, ...]]
End = tuple[float, Callable[..., None], tuple[Any, ...]]


class Engine:
    """``time`` only goes on. Callbacks may ask for more, never in the past."""

    __slots__ = ("_heap", "_sequence", "ends", "events_total", "now_ms", "time")

    def __init__(self) -> None:
        self.time = 0.0
        self.now_ms = EPOCH_MS
        self.ends: deque[End] = deque()
        self.events_total = 0
        self._heap: list[Event] = []
        self._sequence = 0

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (max(when, self.time), self._sequence, what, args))

    def after(self, delay_ms: float, what: Callable[..., None], *args: Any) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (self.time + delay_ms, self._sequence, what, args))

    @property
    def next_time(self) -> float:
        """When the next event of the heap is due; infinity when there is none."""
        return self._heap[0][0] if self._heap else float("inf")

    def run_until(self, when: float) -> None:
        """All that is due up to and at ``when``, which it then is."""
        heap = self._heap
        while heap and heap[0][0] <= when:
            due, _, what, args = heapq.heappop(heap)
            self._end_until(due)
            self._move(due)
            self.events_total += 1
            what(*args)
        self._end_until(when)
        self._move(when)

    def _end_until(self, when: float) -> None:
        ends = self.ends
        while ends and ends[0][0] <= when:
            due, what, args = ends.popleft()
            self._move(due)
            what(*args)

    def _move(self, when: float) -> None:
        if when > self.time:
            self.time = when
            self.now_ms = EPOCH_MS + int(when)


class Trace:
    """What was decided, in order: a digest of everything, and the lines of small runs.

    Two runs that differ in one decision have different digests.
    """

    __slots__ = ("_engine", "_hash", "_keep", "lines")

    def __init__(self, engine: Engine, *, keep: bool) -> None:
        self._engine = engine
        self._hash = hashlib.blake2b(digest_size=8)
        self._keep = keep
        self.lines: list[str] = []

    def note(self, what: str, *about: object) -> None:
        line = f"{self._engine.time:.3f} {what} {' '.join(map(str, about))}"
        self._hash.update(line.encode())
        if self._keep:
            self.lines.append(line)

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()
