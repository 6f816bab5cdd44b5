"""The least of many values that only grow: exact, without work where they grow.

The heap keeps each key under a value that is therefore never too large. Whoever asks for the least
pops, and puts an entry whose value has grown back under its present one; the first entry that is up
to date is the true minimum. Amortised O(log n) an answer, nothing for a change.

Not for use from several threads.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Final

# Below so many entries nobody minds rubbish.
_SMALL: Final = 64


class LazyHeap:
    """Keys ordered by ``value_of(key)``, which only grows; ties by the order in which they came."""

    __slots__ = ("_heap", "_live", "_sequence", "_value_of")

    def __init__(self, value_of: Callable[[str], float]) -> None:
        self._value_of = value_of
        self._heap: list[tuple[float, int, str]] = []
        self._live: dict[str, int] = {}  # key -> its sequence
        self._sequence = 0

    def __len__(self) -> int:
        return len(self._live)

    def __contains__(self, key: str) -> bool:
        return key in self._live

    def __iter__(self) -> Iterator[str]:
        return iter(self._live)

    def add(self, key: str) -> None:
        self._sequence += 1
        self._live[key] = self._sequence
        heapq.heappush(self._heap, (self._value_of(key), self._sequence, key))

    def discard(self, key: str) -> None:
        """Forget a key; its heap entry is dropped when it comes up."""
        self._live.pop(key, None)
        if len(self._heap) > _SMALL and len(self._heap) > 2 * len(self._live):
            self.rebuild()

    def rebuild(self) -> None:
        """``value_of`` measures differently from now on."""
        value_of = self._value_of
        self._heap = [(value_of(key), sequence, key) for key, sequence in self._live.items()]
        heapq.heapify(self._heap)

    def first(self, wanted: Callable[[str], bool], count: int = 1) -> list[str]:
        """The up to ``count`` least keys that are ``wanted``, least first."""
        found: list[str] = []
        looked_at: list[tuple[float, int, str]] = []
        while self._heap and len(found) < count:
            entry = self._up_to_date()
            if entry is None:
                break
            looked_at.append(entry)
            if wanted(entry[2]):
                found.append(entry[2])
        for entry in looked_at:
            heapq.heappush(self._heap, entry)
        return found

    def pop(self) -> str | None:
        """Take the least key out; None when there is none."""
        entry = self._up_to_date()
        if entry is None:
            return None
        del self._live[entry[2]]
        return entry[2]

    def _up_to_date(self) -> tuple[float, int, str] | None:
        """Off the heap: the least entry whose value is its key's present one."""
        while self._heap:
            entry = heapq.heappop(self._heap)
            value, sequence, key = entry
            if self._live.get(key) != sequence:
                continue
            present = self._value_of(key)
            if present > value:
                heapq.heappush(self._heap, (present, sequence, key))
                continue
            return entry
        return None
