"""The order in which copies leave memory: one interface, one file an order.

* ``lru`` (eviction_lru.py): the least recently used copy goes first. Exact; knows nothing else.
* ``frequency`` (eviction_frequency.py): the copy goes first whose absence costs least: uses, old
  ones forgotten at a pace that it finds itself, times what a load takes, per byte.

An order knows only copies that are LOADED, and what it remembers of those that were. Who may go at
all (pins, requests inside, minimums) is the cache's business, which passes a predicate. Requests
only write their copy's ``Use``; an order looks there when a load comes or somebody has to go.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from mesh.core.eviction_frequency import FrequencyOrder
from mesh.core.eviction_lru import LruOrder
from mesh.core.usage import Use


@dataclass(frozen=True, slots=True)
class Newcomer:
    """What an order is told of a model: before it is loaded, and when it is."""

    model_id: str
    size_bytes: int
    load_ms: int = 0  # what its load took; 0: not known yet
    last_used_at_ms: int = 0
    uses_per_s: float = 0.0  # what others saw of it; 0.0: nothing
    asked_for: bool = True  # a request waits for it: that is a use


class EvictionOrder(Protocol):
    """Not for use from several threads."""

    def add(self, newcomer: Newcomer, use: Use, now_ms: int) -> None:
        """A copy is LOADED; ``use`` is what its requests write."""

    def discard(self, model_id: str) -> None:
        """The copy leaves. No-op for one that is not there."""

    def first(self, may_go: Callable[[str], bool], count: int = 1) -> list[str]:
        """The up to ``count`` copies that should go first, of those that may, in that order."""

    def outranks(self, newcomer: Newcomer, model_id: str) -> bool:
        """Whether it is right that the copy ``model_id`` goes so that ``newcomer`` can come."""

    def worth(self, model_id: str, now_ms: int) -> float:
        """What keeping the copy saves: a logarithm to base 2, above 0.0. Comparable between
        instances that use the same order, so that a load goes where it pushes out least."""

    def oldest_use_at_ms(self) -> int:
        """The instant of the least recent last use; 0 when there is no copy."""


ORDERS: Final[Mapping[str, Callable[[int, int], EvictionOrder]]] = {
    "lru": lambda capacity_bytes, remembered_max: LruOrder(),
    "frequency": FrequencyOrder,
}


def eviction_order(name: str, capacity_bytes: int, remembered_max: int) -> EvictionOrder:
    """Raises ValueError naming what there is."""
    made = ORDERS.get(name)
    if made is None:
        raise ValueError(f"eviction_order {name!r} is none of {', '.join(sorted(ORDERS))}")
    return made(capacity_bytes, remembered_max)
