"""Which copies may leave memory, and which goes first: the part of the cache that knows its order.

Owns the eviction order and the books of copies that are pinned, kept, or to go when they rest.
Evicts nothing itself: the cache asks, and moves the copies. Who may go:

* no copy that is pinned, has requests inside, or was loaded for requests that are on their way
  (one with requests inside only when a load has waited for long and no copy rests);
* ``kept`` copies only after all others, as long as they are within their share of the capacity
  (the most recently used come first into it), and only for a load that somebody waits for;
* for a load that nobody waits for, only copies that are worth less than what it brings.
"""

from __future__ import annotations

from collections.abc import Iterable

from mesh.core.cache_table import LOADED, CacheConfig, Copy
from mesh.core.eviction import EvictionOrder, Newcomer, eviction_order
from mesh.core.types import LoadPriority
from mesh.core.usage import uses_per_s


class Room:
    """See the module's docstring."""

    def __init__(self, config: CacheConfig, copies: dict[str, Copy]) -> None:
        self.config = config
        self._copies = copies  # the cache's own
        self._order = _order(config)
        self._pinned: dict[str, Copy] = {}
        self._kept: dict[str, Copy] = {}
        self._resting: dict[str, Copy] = {}  # with an idle time-out

    def use_config(self, config: CacheConfig, now_ms: int) -> None:
        changed = config.eviction_order != self.config.eviction_order
        self.config = config
        if changed:
            self._order = _order(config)
            for copy in self._copies.values():
                if copy.state is LOADED:
                    self._order.add(self._newcomer(copy, now_ms, asked_for=False), copy.use, now_ms)

    # ---- the books ----

    def terms(self, copy: Copy) -> None:
        """Its pin, its minimum or its idle time-out is new."""
        for wanted, book in (
            (copy.pinned, self._pinned),
            (copy.kept, self._kept),
            (copy.idle_unload_ms > 0, self._resting),
        ):
            if wanted:
                book[copy.model_id] = copy
            else:
                book.pop(copy.model_id, None)

    def loaded(self, copy: Copy, now_ms: int) -> None:
        asked_for = copy.priority is LoadPriority.AWAITED
        self._order.add(self._newcomer(copy, now_ms, asked_for=asked_for), copy.use, now_ms)

    def leaving(self, model_id: str) -> None:
        """It does not serve any more, whatever is left of it."""
        self._order.discard(model_id)

    def left(self, model_id: str) -> None:
        self._order.discard(model_id)
        for book in (self._pinned, self._kept, self._resting):
            book.pop(model_id, None)

    # ---- who goes ----

    def victim(
        self, now_ms: int, load: Copy | None = None, *, busy_too: bool = False
    ) -> str | None:
        """The copy that should go now, for ``load`` when nobody waits for that; ``busy_too``: it
        may have requests inside, and goes when they have ended."""
        protected = self._protected()

        def may_go(model_id: str) -> bool:
            return model_id not in protected and self.evictable(model_id, now_ms, busy_too)

        found = self._order.first(may_go)
        if load is not None and load.priority is not LoadPriority.AWAITED:
            newcomer = self._newcomer(load, now_ms, asked_for=False)
            return found[0] if found and self._order.outranks(newcomer, found[0]) else None
        if not found and protected:
            found = self._order.first(lambda model_id: self.evictable(model_id, now_ms, busy_too))
        return found[0] if found else None

    def evictable(self, model_id: str, now_ms: int, busy_too: bool = False) -> bool:
        copy = self._copies[model_id]
        if copy.pinned or (copy.use.in_flight and not busy_too):
            return False
        return not copy.awaits_first_use(now_ms, self.config.first_use_grace_ms)

    def out_of_patience(self, load: Copy, now_ms: int) -> bool:
        """It has waited for a copy that rests for a quarter of what it may wait in all."""
        wait_ms = self.config.memory_wait_ms
        return load.awaited and wait_ms > 0 and now_ms - load.waiting_at_ms >= wait_ms / 4

    def would_churn(self, now_ms: int) -> bool:
        if not self.config.min_churn_age_ms:
            return False
        victim = self.victim(now_ms)
        if victim is None:
            return False
        return now_ms - self._copies[victim].use.last_used_at_ms < self.config.min_churn_age_ms

    def obtainable_bytes(self, active: Iterable[Copy]) -> int:
        """What loads could get if all that may go did go: capacity less what stays for sure."""
        stuck = sum(copy.size_bytes for copy in active if copy.load_running)
        return self.unpinned_bytes() - stuck

    def unpinned_bytes(self) -> int:
        pinned = sum(copy.size_bytes for copy in self._pinned.values() if copy.state is LOADED)
        return self.config.capacity_bytes - pinned

    def rested(self, now_ms: int) -> list[Copy]:
        """Copies that nobody has used for their idle time-out, and that nothing keeps here."""
        return [
            copy
            for copy in self._resting.values()
            if copy.state is LOADED
            and not (copy.pinned or copy.kept or copy.use.in_flight)
            and now_ms - max(copy.use.last_used_at_ms, copy.loaded_at_ms) >= copy.idle_unload_ms
        ]

    def oldest_use_at_ms(self) -> int:
        return self._order.oldest_use_at_ms()

    def victim_score(self, now_ms: int) -> float:
        """Worth of the copy that would go first; 0.0 when none may."""
        victim = self.victim(now_ms)
        return 0.0 if victim is None else self._order.worth(victim, now_ms)

    def _protected(self) -> frozenset[str]:
        """Kept copies within their share, the most recently used first."""
        if not self._kept:
            return frozenset()
        left = int(self.config.capacity_bytes * self.config.kept_share_max)
        held = [copy for copy in self._kept.values() if copy.state is LOADED]
        held.sort(key=lambda copy: (-copy.use.last_used_at_ms, copy.sequence))
        protected = []
        for copy in held:
            left -= copy.size_bytes
            if left < 0:
                break
            protected.append(copy.model_id)
        return frozenset(protected)

    def _newcomer(self, copy: Copy, now_ms: int, *, asked_for: bool) -> Newcomer:
        return Newcomer(
            copy.model_id,
            size_bytes=copy.size_bytes or copy.need_bytes,
            load_ms=copy.load_ms,
            last_used_at_ms=copy.use.last_used_at_ms,
            uses_per_s=uses_per_s(copy.use_score, now_ms, self.config.use_half_life_ms),
            asked_for=asked_for,
        )


def _order(config: CacheConfig) -> EvictionOrder:
    return eviction_order(
        config.eviction_order, config.capacity_bytes, config.evicted_remembered_max
    )
