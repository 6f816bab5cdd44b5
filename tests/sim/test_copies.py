"""Numbers of copies in a simulated mesh: minimums, pins, loads ahead of requests, hot models."""

from __future__ import annotations

from dataclasses import replace

from bench.sim import workloads
from bench.sim.cluster import Cluster
from bench.sim.faults import Crash, RestartAll
from bench.sim.world import MIB
from tests.sim.meshes import SMALL, small


def copies(cluster: Cluster, model_id: str) -> int:
    return len(cluster.world.store.copies.get(model_id, {}))


def test_a_minimum_is_there_again_after_a_crash() -> None:
    settings = replace(SMALL, wanting=4, capacity_bytes=30 * MIB)
    cluster, _ = small([Crash(30_000, 1)], settings=settings)
    assert [copies(cluster, f"model-{n}") >= 2 for n in range(4)] == [True] * 4


def test_a_pinned_model_has_one_pinned_copy_also_after_a_crash() -> None:
    settings = replace(SMALL, pinned=3)
    cluster, _ = small([Crash(20_000, 1), Crash(40_000, 2)], settings=settings)
    for number in range(3):
        found = cluster.world.store.copies[f"model-{number}"].values()
        assert sum(record.pinned for record, _ in found) == 1


def test_after_a_restart_of_everything_what_was_used_comes_back_ahead_of_requests() -> None:
    settings = replace(SMALL, capacity_bytes=60 * MIB)
    shape = workloads.Shape(models=100, requests=1_000, per_s=8.0)
    cluster, _ = small([RestartAll(60_000)], settings=settings, shape=shape)
    assert cluster.world.stats.proactive >= 5


def test_a_hot_model_gets_more_copies_and_one_party_decides() -> None:
    """2,000 requests a minute are enough for one copy."""
    shape = workloads.Shape(models=3, requests=9_000, per_s=150.0)
    cluster, outcome = small(settings=replace(SMALL, watch_ms=50.0), shape=shape)
    assert outcome.failed == 0
    assert 2 <= copies(cluster, hottest(cluster)) <= 4
    assert cluster.world.stats.scaled_up <= 6


def hottest(cluster: Cluster) -> str:
    counts = [sum(c) for c in zip(*(r.uses.counts for r in cluster.world.routers), strict=True)]
    return cluster.ids[counts.index(max(counts))]
