"""When an instance says something new of itself: not for every byte, but before anyone is misled.

Pure. Routers count free memory from copies and their own placements too, so small drifts can wait.
"""

from __future__ import annotations

from dataclasses import replace

from mesh.core.policy import Policy
from mesh.core.types import InstanceRecord

# Shares and distances are ModelMesh's (protocols.md A 2.5).
CAPACITY_SHARE = 0.02
USED_SHARE = 0.2
FREE_SHARE = 0.05  # of capacity: what decides whether a model fits
LRU_SHARE = 0.06
LRU_MS = 20_000
COUNT_SHARE = 0.15
COUNT = 10
LOADING = 3
VICTIM_SCORE = 1.0  # twice or half the worth


def notable(
    last: InstanceRecord | None, new: InstanceRecord, since_ms: int, policy: Policy
) -> str | None:
    """Why ``new`` is to be published now, ``since_ms`` after ``last`` was; None: not yet."""
    if last is None:
        return "first"
    if last == new:
        return None
    if _plain(last) != _plain(new):
        return "state"
    if since_ms < policy.advert_min_interval_ms:
        return None
    if since_ms >= policy.advert_max_interval_ms:
        return "interval"
    capacity = last.capacity_bytes
    if abs(new.capacity_bytes - capacity) > CAPACITY_SHARE * capacity:
        return "capacity"
    if (last.used_bytes > capacity) != (new.used_bytes > new.capacity_bytes):
        return "used"  # a model larger than predicted came, or room has been made for it
    drift = abs(new.used_bytes - last.used_bytes)
    if drift > USED_SHARE * max(1, last.used_bytes) or drift > FREE_SHARE * capacity:
        return "used"
    count = abs(new.model_count - last.model_count)
    if count >= COUNT or count > COUNT_SHARE * max(1, last.model_count):
        return "count"
    loading = abs(new.loading_count - last.loading_count)
    if loading >= LOADING or (loading and 0 in (new.loading_count, last.loading_count)):
        return "loading"
    lru = abs(new.lru_at_ms - last.lru_at_ms)
    if lru > LRU_MS and lru > LRU_SHARE * max(1, since_ms):
        return "lru"
    victim = abs(new.victim_score - last.victim_score)
    if victim > VICTIM_SCORE or (victim and not (new.victim_score and last.victim_score)):
        return "victim"
    return None


def _plain(record: InstanceRecord) -> InstanceRecord:
    """Without what drifts all the time: state, address and the like are told at once."""
    return replace(
        record,
        capacity_bytes=0,
        used_bytes=0,
        model_count=0,
        loading_count=0,
        lru_at_ms=0,
        requests_per_minute=0,
        victim_score=0.0,
    )
