"""Least recently used first: exact, and all that it needs is one instant a copy."""

from __future__ import annotations

from collections.abc import Callable
from math import log2
from typing import TYPE_CHECKING, Final

from mesh.core.eviction_heap import LazyHeap
from mesh.core.usage import Use

if TYPE_CHECKING:
    from mesh.core.eviction import Newcomer

# Keeps the logarithm of any worth above zero, which says that nothing can go.
WORTH_OFFSET: Final = 64.0


class LruOrder:
    """An ``EvictionOrder``; ties go in the order in which the copies came."""

    __slots__ = ("_heap", "_uses")

    def __init__(self) -> None:
        self._uses: dict[str, Use] = {}
        self._heap = LazyHeap(self._last_used_at_ms)

    def _last_used_at_ms(self, model_id: str) -> float:
        return self._uses[model_id].last_used_at_ms

    def add(self, newcomer: Newcomer, use: Use, now_ms: int) -> None:
        self._uses[newcomer.model_id] = use
        self._heap.add(newcomer.model_id)

    def discard(self, model_id: str) -> None:
        self._heap.discard(model_id)
        self._uses.pop(model_id, None)

    def first(self, may_go: Callable[[str], bool], count: int = 1) -> list[str]:
        return self._heap.first(may_go, count)

    def outranks(self, newcomer: Newcomer, model_id: str) -> bool:
        return newcomer.last_used_at_ms > self._uses[model_id].last_used_at_ms

    def worth(self, model_id: str, now_ms: int) -> float:
        """log2 of uses a second, were the next one as far away as the last, plus the offset."""
        idle_ms = max(1, now_ms - self._uses[model_id].last_used_at_ms)
        return WORTH_OFFSET + log2(1_000.0 / idle_ms)

    def oldest_use_at_ms(self) -> int:
        oldest = self._heap.first(lambda _: True)
        return self._uses[oldest[0]].last_used_at_ms if oldest else 0
