"""The simulator of one cache is right about orders that a few lines can check."""

from __future__ import annotations

from collections import OrderedDict

import numpy as np
import pytest

from bench.sim import one_cache, workloads
from bench.sim.workloads import Chunk, Shape, Workload

SAME = workloads.zipf(Shape(models=400, requests=8_000), 0.9)
MIXED = workloads.zipf(Shape(models=400, requests=8_000, mixed=True), 0.9)
ROOM = 20


def room_bytes(workload: Workload) -> int:
    return int(workload.size_bytes.sum() * ROOM / workload.model_count)


def test_the_production_lru_hits_exactly_as_a_dumb_one_does() -> None:
    stream = SAME.all_requests(1)
    cache: OrderedDict[int, None] = OrderedDict()
    warm = int(len(stream.model) * one_cache.WARM_SHARE)
    hits = 0
    for at, model in enumerate(stream.model.tolist()):
        hits += model in cache and at >= warm
        cache[model] = None
        cache.move_to_end(model)
        if len(cache) > ROOM:
            cache.popitem(last=False)
    found = one_cache.production(SAME, stream, room_bytes(SAME), "lru")
    assert found.hit_ratio == hits / (len(stream.model) - warm)


@pytest.mark.parametrize("workload", [SAME, MIXED], ids=["same", "mixed"])
def test_nothing_beats_the_bound_and_the_shipped_order_beats_lru(workload: Workload) -> None:
    found = one_cache.measure(workload, 1)
    bound = found["clairvoyant bound"].saved
    assert all(result.saved <= bound + 1e-9 for result in found.values())
    assert found[one_cache.SHIPPED].saved > found["lru"].saved > found["random"].saved


def test_half_of_the_gap_is_closed_on_zipf_and_nothing_is_lost_where_popularity_moves() -> None:
    """In small; bench/results/sim-eviction.json has the figures."""
    made = Shape(models=600, requests=12_000)
    for workload in (workloads.zipf(made, 0.9), workloads.bursts(made)):
        found = one_cache.measure(workload, 1)
        for claim in one_cache.claims(workload, found):
            assert claim.reached, claim


def test_belady_keeps_what_comes_soonest() -> None:
    model = np.array([0, 1, 2, 0, 1, 2, 0, 1], np.int64)
    ones = np.ones(3, np.int64)
    workload = Workload("w", "", ones, ones, len(model), lambda rng: iter(()))
    stream = Chunk(np.arange(len(model)), model)
    found = one_cache.clairvoyant(workload, stream, 2)
    # Of 2 0 1 2 0 1 after the first quarter: 0, then 2 (or 1), then 1 (or 0) are there.
    assert found.loads == 3


def test_the_flow_bound_is_no_less_than_belady_where_models_are_alike() -> None:
    stream = SAME.all_requests(3)
    exact = one_cache._belady(SAME, stream, ROOM)
    bound = one_cache._flow_bound(SAME, stream, room_bytes(SAME))
    assert exact.saved <= bound.saved <= exact.saved + 0.1
