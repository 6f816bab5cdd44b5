"""What an instance says of itself, and when: ``mesh.instance.membership`` on the virtual clock.

Production looks every half second whether there is something to say; here only while something may
have changed, which saves most of the looks and none of the words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from bench.sim.store import LastUsed
from mesh.core.cache_events import Tick
from mesh.core.types import InstanceRecord
from mesh.instance.advert import notable

if TYPE_CHECKING:
    from bench.sim.instance import SimInstance

RATE_WINDOW_MS: Final = 10_000


class Telling:
    """Adverts, last uses, and the ticks of the cache."""

    def __init__(self, instance: SimInstance) -> None:
        self._instance = instance
        self._world = instance.world
        now_ms = instance.world.engine.now_ms
        self._started_at_ms = now_ms
        self._last: InstanceRecord | None = None
        self._last_at_ms = 0
        self._flushed_at_ms = now_ms
        self._rate = (now_ms, 0, 0)  # since when, requests then, requests a minute
        self._next_tick = 0.0

    def something_happened(self) -> None:
        self._tick_in(self._world.settings.tick_ms)

    def _tick(self, due: float) -> None:
        if due != self._next_tick:
            return  # an earlier one has been asked for since
        instance, policy = self._instance, self._world.policy
        if instance.cache.loading_count:
            instance.apply(Tick())
        self.advertise()
        now_ms = self._world.engine.now_ms
        if now_ms - self._flushed_at_ms >= policy.last_used_flush_ms:
            self._flush_last_used()
        told_ms_ago = now_ms - self._last_at_ms
        busy = instance.cache.loading_count or told_ms_ago < policy.advert_min_interval_ms
        self._next_tick = 0.0
        self._tick_in(self._world.settings.tick_ms if busy else policy.advert_max_interval_ms)

    def _tick_in(self, delay_ms: float) -> None:
        due = self._world.engine.time + delay_ms
        if not self._next_tick or due < self._next_tick:
            self._next_tick = due
            self._instance.after(delay_ms, self._tick, due)

    def advertise(self) -> None:
        """If there is something notable."""
        record, now_ms = self.record(), self._world.engine.now_ms
        reason = notable(self._last, record, now_ms - self._last_at_ms, self._world.policy)
        if reason is not None:
            self._last, self._last_at_ms = record, now_ms
            self._instance.publishing.put_own(record)

    def _flush_last_used(self) -> None:
        instance, half_life_ms = self._instance, self._world.policy.use_half_life_ms
        self._flushed_at_ms = self._world.engine.now_ms
        uses, scores = instance.use_book.flush(instance.cache.copies(), half_life_ms)
        if uses:
            instance.publishing.put(LastUsed(instance.instance_id, uses, scores))

    def record(self) -> InstanceRecord:
        instance, cache = self._instance, self._instance.cache
        return InstanceRecord(
            instance_id=instance.instance_id,
            address=instance.instance_id,
            state=instance.state,
            capacity_bytes=cache.config.capacity_bytes,
            used_bytes=cache.used_bytes,
            model_count=len(instance.servables),
            loading_count=cache.loading_count,
            load_slots=cache.config.load_slots,
            lru_at_ms=cache.oldest_use_at_ms(),
            requests_per_minute=self._requests_per_minute(),
            started_at_ms=self._started_at_ms,
            model_types=("onnx",),
            zone=instance.zone,
            victim_score=cache.victim_score(self._world.engine.now_ms),
        )

    def _requests_per_minute(self) -> int:
        since_ms, count, rate = self._rate
        now_ms, requests = self._world.engine.now_ms, self._instance.requests
        if now_ms - since_ms >= RATE_WINDOW_MS:
            rate = round((requests - count) * 60_000 / (now_ms - since_ms))
            self._rate = (now_ms, requests, rate)
        return rate
