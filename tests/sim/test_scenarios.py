"""Each failure of the mesh in virtual time: who waits, who fails, what is left behind.

Safety is checked at every event and rest at the end by the simulator itself (``bench.sim.checks``);
what is asserted here is what clients see.
"""

from __future__ import annotations

import pytest

from bench.sim.faults import (
    BadModels,
    Crash,
    Drain,
    Fault,
    RestartAll,
    RouterCrash,
    SlowLoads,
    Stop,
    StoreAway,
)
from tests.sim.meshes import small


@pytest.mark.parametrize(
    "faults",
    [
        pytest.param([], id="nothing goes wrong"),
        pytest.param([Crash(20_000, 1)], id="kill -9 of an instance"),
        pytest.param([Crash(20_000, 1, restarts=False)], id="an instance dies for good"),
        pytest.param([Stop(20_000, 1, 5_000)], id="SIGSTOP within the lease"),
        pytest.param([Stop(20_000, 1, 15_000)], id="SIGSTOP beyond the lease"),
        pytest.param([Drain(20_000, 1)], id="SIGTERM of an instance"),
        pytest.param([Drain(20_000, 1, restarts=False)], id="an instance leaves for good"),
        pytest.param(
            [Drain(10_000 + 12_000 * place, place) for place in range(4)],
            id="rolling restart of all instances",
        ),
        pytest.param([StoreAway(20_000, 10_000)], id="etcd away for ten seconds"),
        pytest.param(
            [StoreAway(20_000, 20_000), Crash(25_000, 1)], id="a crash while etcd is away"
        ),
        pytest.param(
            [StoreAway(20_000, 12_000), Stop(21_000, 2, 15_000)], id="both stop for a while"
        ),
        pytest.param([RouterCrash(20_000, 0)], id="kill -9 of the router that leads"),
        pytest.param([RouterCrash(20_000, 1), Crash(20_000, 2)], id="a router and an instance die"),
        pytest.param([SlowLoads(15_000, 0, 30_000, 15.0)], id="loads are slow on one instance"),
        pytest.param([RestartAll(30_000)], id="all instances restart at once"),
    ],
)
def test_no_request_fails(faults: list[Fault]) -> None:
    cluster, outcome = small(faults)
    assert outcome.failed == 0, dict(cluster.world.stats.errors)
    assert outcome.requests == 1_200
    assert cluster.world.stats.hits + cluster.world.stats.missed == 1_200


def test_a_broken_model_fails_and_the_others_do_not() -> None:
    cluster, outcome = small([BadModels(5_000, always=3)])
    stats = cluster.world.stats
    assert outcome.failed == 0, dict(stats.errors)
    assert stats.failed_broken > 0
    # Each is tried on at most so many instances until the failures expire.
    assert stats.load_failures <= 3 * cluster.settings.policy.max_load_failures


def test_a_load_that_fails_now_and_then_is_tried_elsewhere() -> None:
    cluster, outcome = small([BadModels(0, always=0, sometimes=100, share=0.1)])
    stats = cluster.world.stats
    assert stats.load_failures > 10
    assert outcome.failed <= 3, dict(stats.errors)


def test_a_drain_moves_what_is_in_use() -> None:
    cluster, _ = small([Drain(40_000, 1)])
    assert cluster.world.stats.moved >= 5


def test_while_the_store_is_away_misses_are_placed_all_the_same() -> None:
    cluster, _ = small([StoreAway(20_000, 30_000)])
    begun = [
        line
        for line in cluster.world.trace.lines
        if line.split()[1] == "load" and 24_000 < float(line.split()[0]) < 50_000
    ]
    assert len(begun) > 20


def test_the_first_requests_for_one_model_cause_one_load() -> None:
    cluster, _ = small()
    for _ in range(100):
        for router in cluster.world.routers:
            router.request("model-99")
    before = cluster.world.stats.loads_started
    copies = len(cluster.world.store.copies.get("model-99", {}))
    cluster.settle()
    assert cluster.world.stats.loads_started - before == (0 if copies else 1)
    assert len(cluster.world.store.copies["model-99"]) == 1


def test_loads_are_spread_over_the_instances_also_after_a_restart() -> None:
    _, outcome = small([Crash(20_000, 1), Crash(50_000, 2)])
    assert outcome.imbalance < 1.3
