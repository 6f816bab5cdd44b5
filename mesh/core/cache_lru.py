"""Which copy is the least recently used: exact, without work on the request path.

A request only overwrites ``Use.last_used_at_ms``, which never goes back. The heap keeps each copy
under an instant that is therefore never too new; whoever asks for the oldest pops, and puts an
entry whose instant has moved back under its present one. The first entry that is up to date is
the true minimum. Amortised O(log n), nothing per request.

Not for use from several threads.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable


class Use:
    """What the request path knows of one copy. It alone writes; the cache reads."""

    __slots__ = ("in_flight", "last_used_at_ms", "uses")

    def __init__(self, last_used_at_ms: int = 0) -> None:
        self.in_flight = 0  # requests inside, queued ones included
        self.last_used_at_ms = last_used_at_ms
        self.uses = 0  # requests since it came; only grows

    def __repr__(self) -> str:
        return (
            f"Use(in_flight={self.in_flight}, uses={self.uses}, "
            f"last_used_at_ms={self.last_used_at_ms})"
        )


class LazyLru:
    """Keys ordered by last use; ties by the order in which they came."""

    __slots__ = ("_heap", "_live", "_sequence")

    def __init__(self) -> None:
        self._heap: list[tuple[int, int, str]] = []
        self._live: dict[str, tuple[int, Use]] = {}  # key -> (its sequence, its use)
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._live)

    def add(self, key: str, use: Use) -> None:
        self._sequence += 1
        self._live[key] = (self._sequence, use)
        heapq.heappush(self._heap, (use.last_used_at_ms, self._sequence, key))

    def discard(self, key: str) -> None:
        """Forget a key; its heap entry is dropped when it comes up."""
        self._live.pop(key, None)
        if len(self._heap) > 64 and len(self._heap) > 2 * len(self._live):
            self._heap = [
                (use.last_used_at_ms, sequence, name)
                for name, (sequence, use) in self._live.items()
            ]
            heapq.heapify(self._heap)

    def oldest(self, wanted: Callable[[str], bool], count: int = 1) -> list[str]:
        """The up to ``count`` least recently used keys that are ``wanted``, oldest first."""
        found: list[str] = []
        looked_at: list[tuple[int, int, str]] = []
        while self._heap and len(found) < count:
            entry = heapq.heappop(self._heap)
            instant, sequence, key = entry
            live = self._live.get(key)
            if live is None or live[0] != sequence:
                continue
            now_instant = live[1].last_used_at_ms
            if now_instant > instant:
                heapq.heappush(self._heap, (now_instant, sequence, key))
                continue
            looked_at.append(entry)
            if wanted(key):
                found.append(key)
        for entry in looked_at:
            heapq.heappush(self._heap, entry)
        return found

    def oldest_use_at_ms(self) -> int:
        """Last use of the oldest key; 0 when there is none."""
        oldest = self.oldest(lambda _: True)
        return self._live[oldest[0]][1].last_used_at_ms if oldest else 0
