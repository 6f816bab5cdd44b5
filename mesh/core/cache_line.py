"""The copies that are not LOADED: who is next for a slot or for memory, and what they want in all.

Part of the cache: reads its copies and moves none.
"""

from __future__ import annotations

from dataclasses import dataclass

from mesh.core.cache_table import HOLDS_SLOT, LOADING, QUEUED, SIZING, UNLOADING, WAITING, Copy


@dataclass(frozen=True, slots=True)
class Demand:
    """``wanted_bytes`` of memory have to be freed for loads that somebody waits for, beyond what
    is being freed already; below zero when there is more. ``claims`` are of those that nobody
    waits for, in order. ``awaited``: loads that somebody waits for go on."""

    wanted_bytes: int
    claims: list[tuple[Copy, int]]
    awaited: bool
    unloads_wait: bool  # a copy that is to go has requests inside


class Line:
    """See the module's docstring."""

    def __init__(self, active: dict[str, Copy]) -> None:
        self._active = active  # the cache's own

    def waiting(self) -> list[Copy]:
        """For memory, the first in order first."""
        waiting = [copy for copy in self._active.values() if copy.state is WAITING]
        waiting.sort(key=Copy.queue_order)
        return waiting

    def queued(self) -> list[Copy]:
        """For a slot, the first in order first."""
        queued = [copy for copy in self._active.values() if copy.state is QUEUED]
        queued.sort(key=Copy.queue_order)
        return queued

    def sizing(self) -> list[Copy]:
        """In the order in which they came."""
        sizing = [copy for copy in self._active.values() if copy.state is SIZING]
        sizing.sort(key=lambda copy: copy.sequence)
        return sizing

    def slots_held(self) -> int:
        return sum(copy.state in HOLDS_SLOT for copy in self._active.values())

    def loading_count(self) -> int:
        """Loads queued or under way."""
        return sum(copy.state is not UNLOADING for copy in self._active.values())

    def is_first(self, copy: Copy) -> bool:
        """Nobody goes before it who waits for memory."""
        mine = copy.queue_order()
        return not any(
            other.state is WAITING and other.queue_order() < mine for other in self._active.values()
        )

    def wants_memory(self) -> bool:
        return any(copy.state in (WAITING, SIZING) for copy in self._active.values())

    def demand(self, over_bytes: int) -> Demand:
        """``over_bytes`` is what is used above the capacity, below zero what is free."""
        waiting = self.waiting()
        claims = [(copy, copy.need_bytes) for copy in waiting if not copy.awaited]
        wanted = over_bytes + sum(copy.need_bytes for copy in waiting if copy.awaited)
        awaited = unloads_wait = False
        for copy in self._active.values():
            if copy.state is UNLOADING:
                wanted -= copy.size_bytes
                unloads_wait = unloads_wait or copy.use.in_flight > 0
            elif copy.state is SIZING and not copy.awaited:
                wanted -= copy.overrun_bytes
                claims.append((copy, copy.overrun_bytes))
            awaited = awaited or (copy.awaited and copy.state in (WAITING, LOADING))
        return Demand(wanted, claims, awaited, unloads_wait)
