"""When an instance says something new of itself."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mesh.core.policy import Policy
from mesh.core.types import InstanceRecord, InstanceState
from mesh.instance.advert import notable

POLICY = Policy()
LAST = InstanceRecord(
    "i", "h:1", InstanceState.READY, 1_000_000, used_bytes=500_000, model_count=100,
    loading_count=0, lru_at_ms=1_000_000, victim_score=100.0,
)  # fmt: skip
SOON = POLICY.advert_min_interval_ms


@pytest.mark.parametrize(
    ("change", "since_ms", "reason"),
    [
        ({}, 10 * SOON, None),
        ({"state": InstanceState.DRAINING}, 0, "state"),
        ({"address": "h:2"}, 0, "state"),
        ({"used_bytes": 900_000}, SOON - 1, None),
        ({"used_bytes": 900_000}, SOON, "used"),
        ({"used_bytes": 551_000}, SOON, "used"),
        ({"used_bytes": 501_000}, SOON, None),
        ({"used_bytes": 501_000}, POLICY.advert_max_interval_ms, "interval"),
        ({"capacity_bytes": 1_021_000}, SOON, "capacity"),
        ({"model_count": 110}, SOON, "count"),
        ({"model_count": 109}, SOON, None),
        ({"loading_count": 1}, SOON, "loading"),
        ({"lru_at_ms": 1_020_001}, SOON, "lru"),
        ({"lru_at_ms": 1_019_000}, SOON, None),
        ({"victim_score": 102.0}, SOON, "victim"),
        ({"victim_score": 100.5}, SOON, None),
        ({"victim_score": 0.0}, SOON, "victim"),
        ({"replica_set": "2"}, 0, "state"),
        ({"requests_per_minute": 7}, SOON, None),
    ],
)
def test_a_change_is_told_when_somebody_could_be_misled(
    change: dict[str, object], since_ms: int, reason: str | None
) -> None:
    assert notable(LAST, replace(LAST, **change), since_ms, POLICY) == reason  # type: ignore[arg-type]


def test_that_memory_is_within_its_bound_again_is_told_however_little_was_over() -> None:
    over = replace(LAST, used_bytes=1_000_001)
    assert notable(over, replace(over, used_bytes=999_999), SOON, POLICY) == "used"
    assert notable(over, replace(over, used_bytes=1_000_002), SOON, POLICY) is None


def test_loading_that_stays_above_zero_is_told_in_steps() -> None:
    busy = replace(LAST, loading_count=2)
    assert notable(busy, replace(busy, loading_count=3), SOON, POLICY) is None
    assert notable(busy, replace(busy, loading_count=5), SOON, POLICY) == "loading"


def test_the_first_record_is_told_at_once() -> None:
    assert notable(None, LAST, 0, POLICY) == "first"
