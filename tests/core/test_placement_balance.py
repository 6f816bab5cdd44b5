"""Several routers that place at once from old adverts spread loads evenly: no herds."""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import replace
from math import log2

import pytest

from mesh.core.placement import Placement, place
from mesh.core.policy import Policy
from mesh.core.types import InstanceRecord
from mesh.core.view import ClusterView
from tests.core.cluster import NOW, instance, model

INSTANCES = 24
ROUTERS = 4
LOADS = 1_200
CAPACITY = 50
# Adverts and other routers' loads are seen after so many loads: a few thousand loads a second.
SEEN_AFTER = 60


class Pod:
    """What an instance would hold: plain LRU of models of size 1."""

    def __init__(self, instance_id: str, held: int) -> None:
        self.instance_id = instance_id
        self.held: OrderedDict[str, int] = OrderedDict()
        for n in range(held):
            self.held[f"{instance_id}-{n}"] = NOW - 900_000 + n * 9

    def load(self, model_id: str, at_ms: int) -> None:
        if len(self.held) == CAPACITY:
            self.held.popitem(last=False)
        self.held[model_id] = at_ms

    def advert(self, now_ms: int, scored: bool) -> InstanceRecord:
        oldest_ms = next(iter(self.held.values()), 0)
        worth = 100.0 - log2(max(1, now_ms - oldest_ms)) if scored and self.held else 0.0
        return instance(
            self.instance_id,
            capacity=CAPACITY,
            used_bytes=len(self.held),
            lru_at_ms=oldest_ms,
            load_slots=64,
            victim_score=worth,
        )


def loads_by_instance(held: int, policy: Policy, *, scored: bool = False) -> Counter[str]:
    pods = {f"i{n}": Pod(f"i{n}", held) for n in range(INSTANCES)}
    views = [ClusterView() for _ in range(ROUTERS)]
    landed: Counter[str] = Counter()
    for n in range(LOADS):
        now_ms = NOW + n
        if n % SEEN_AFTER == 0:
            for view in views:
                view.expire_pending(asked_before_ms=now_ms)
                for pod in pods.values():
                    view.put_instance(pod.advert(now_ms, scored))
        view = views[n % ROUTERS]
        one = model(f"m{n}", size_bytes_stated=1)
        found = place(view, one, now_ms=now_ms, policy=policy)
        assert isinstance(found, Placement)
        view.add_pending(one.model_id, found.instance_id, size_bytes=1, now_ms=now_ms)
        pods[found.instance_id].load(one.model_id, now_ms)
        landed[found.instance_id] += 1
    return landed


def imbalance(landed: Counter[str]) -> float:
    return max(landed.values()) / (LOADS / INSTANCES)


@pytest.mark.parametrize(
    ("held", "scored"),
    [
        pytest.param(0, False, id="empty"),
        pytest.param(CAPACITY // 2, False, id="half full"),
        pytest.param(CAPACITY, False, id="full, by age"),
        pytest.param(CAPACITY, True, id="full, by worth"),
    ],
)
def test_loads_spread_over_equal_instances(held: int, scored: bool) -> None:
    assert imbalance(loads_by_instance(held, Policy(), scored=scored)) < 1.3


def test_no_instance_is_left_out() -> None:
    landed = loads_by_instance(CAPACITY, Policy())
    assert len(landed) == INSTANCES and min(landed.values()) > 0.5 * LOADS / INSTANCES


def test_taking_the_best_each_time_would_herd() -> None:
    """What the draw is for: this is how it looks without."""
    strict = replace(
        Policy(),
        close_free_share=1.0,
        close_lru_share=1.0,
        close_score_share=1.0,
        advert_min_interval_ms=0,
    )
    assert imbalance(loads_by_instance(CAPACITY, strict)) > 1.3


def test_the_draw_is_even() -> None:
    view = ClusterView()
    for n in range(10):
        view.put_instance(instance(f"i{n}"))
    landed: Counter[str] = Counter()
    for n in range(2_000):
        found = place(view, model(f"m{n}", size_bytes_stated=1), now_ms=NOW, policy=Policy())
        assert isinstance(found, Placement)
        landed[found.instance_id] += 1
    assert min(landed.values()) > 140 and max(landed.values()) < 260  # 200 each, 4 sigma
