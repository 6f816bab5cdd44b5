"""The books of the cache, checked: what must hold after every event, whatever came before it."""

from __future__ import annotations

from mesh.core.cache import Cache
from mesh.core.cache_table import (
    HOLDS_SLOT,
    LOADED,
    QUEUED,
    SIZING,
    UNLOADING,
    WAITING,
    BrokenInvariant,
    Copy,
)


def validate(cache: Cache) -> None:
    """Raise ``BrokenInvariant`` naming the rule that does not hold and the values at hand."""
    copies = cache.copies()
    total = sum(copy.size_bytes for copy in copies)
    _check(cache.used_bytes == total, f"used_bytes is not the sum of the copies, {total}", cache)
    surplus = sum(copy.overrun_bytes for copy in copies)
    _check(
        cache.used_bytes - surplus <= cache.config.capacity_bytes,
        f"over capacity by more than the measured surplus of {surplus}",
        cache,
    )
    slots = sum(copy.state in HOLDS_SLOT for copy in copies)
    _check(slots <= cache.config.load_slots, f"{slots} loads hold a slot", cache)
    for copy in copies:
        _validate_copy(copy, cache)
    queued = [copy for copy in copies if copy.state is QUEUED]
    for_all = max(1, cache.config.load_slots - 1)  # the last one is for awaited loads
    idle_slot = slots < for_all or (
        slots < cache.config.load_slots and any(c.awaited for c in queued)
    )
    _check(not (queued and idle_slot), "a load is queued beside a free slot", cache)
    waiting = [copy for copy in copies if copy.state is WAITING]
    if waiting:
        first = min(waiting, key=Copy.queue_order)
        _check(
            cache.used_bytes + first.need_bytes > cache.config.capacity_bytes,
            f"{first} waits for memory that is free",
            cache,
        )


def _validate_copy(copy: Copy, cache: Cache) -> None:
    if copy.state in (QUEUED, WAITING):
        _check(copy.size_bytes == 0, f"{copy} counts bytes that it does not have", cache)
    if copy.overrun_bytes:
        _check(copy.state in (SIZING, UNLOADING), f"{copy} is over its reservation", cache)
    if copy.use.in_flight:
        _check(copy.state in (LOADED, UNLOADING), f"{copy} has requests inside", cache)
    if copy.state is UNLOADING:
        reasons = (copy.unload_started, copy.load_running, copy.use.in_flight > 0)
        _check(any(reasons), f"{copy} is forgotten", cache)
        _check(not (copy.unload_started and copy.load_running), f"{copy} does both", cache)
        _check(copy.reason is not None, f"{copy} leaves for no reason", cache)
        if copy.use.in_flight:
            _check(cache.awaiting_idle, f"nobody would tell when {copy} is idle", cache)


def _check(holds: bool, rule: str, cache: Cache) -> None:
    if not holds:
        raise BrokenInvariant(f"{rule}; {cache!r}: {cache.copies()}")
