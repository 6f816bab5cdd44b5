"""What goes wrong, when: values that can be printed, drawn and replayed.

``at_ms`` counts from the first request. Instances are named by their place, 0 and up: a place is
taken by another instance after a crash.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, assert_never

if TYPE_CHECKING:
    from bench.sim.cluster import Cluster


@dataclass(frozen=True, slots=True)
class Crash:
    """kill -9 of an instance; another starts in its place."""

    at_ms: float
    place: int
    restarts: bool = True


@dataclass(frozen=True, slots=True)
class Stop:
    """SIGSTOP of an instance, and SIGCONT: within its lease or beyond it."""

    at_ms: float
    place: int
    for_ms: float


@dataclass(frozen=True, slots=True)
class Drain:
    """SIGTERM of an instance; another starts in its place."""

    at_ms: float
    place: int
    restarts: bool = True
    timeout_ms: float = 30_000.0


@dataclass(frozen=True, slots=True)
class StoreAway:
    """etcd takes no writes and tells of nothing."""

    at_ms: float
    for_ms: float


@dataclass(frozen=True, slots=True)
class SlowLoads:
    """Loads on an instance take so many times as long."""

    at_ms: float
    place: int
    for_ms: float
    factor: float


@dataclass(frozen=True, slots=True)
class BadModels:
    """From then on the first ``always`` models fail on every try, and the next ``sometimes`` with
    probability ``share``."""

    at_ms: float
    always: int
    sometimes: int = 0
    share: float = 0.5


@dataclass(frozen=True, slots=True)
class RouterCrash:
    """kill -9 of a router; its clients ask the others, and another starts in its place."""

    at_ms: float
    number: int


@dataclass(frozen=True, slots=True)
class RestartAll:
    """Every instance crashes at once."""

    at_ms: float


Fault = Crash | Stop | Drain | StoreAway | SlowLoads | BadModels | RouterCrash | RestartAll


def schedule(cluster: Cluster, faults: Iterable[Fault]) -> None:
    start = cluster.world.engine.time
    for fault in faults:
        cluster.world.engine.at(start + fault.at_ms, happen, cluster, fault)


def happen(cluster: Cluster, fault: Fault) -> None:
    world = cluster.world
    world.trace.note("fault", fault)
    match fault:
        case Crash(place=place, restarts=restarts):
            cluster.crash(place, restarts=restarts)
        case RestartAll():
            for place in range(len(cluster.places)):
                cluster.crash(place, restarts=True)
        case Stop(place=place, for_ms=for_ms):
            cluster.stop(place, for_ms)
        case Drain(place=place, restarts=restarts, timeout_ms=timeout_ms):
            cluster.drain(place, timeout_ms, restarts=restarts)
        case StoreAway(for_ms=for_ms):
            world.troubles.excuse = True
            world.store.pause()
            world.engine.after(for_ms, world.store.resume)
        case SlowLoads(place=place, for_ms=for_ms, factor=factor):
            instance_id = cluster.places[place % len(cluster.places)]
            world.troubles.load_factor[instance_id] = factor
            world.engine.after(for_ms, world.troubles.as_fast_again, instance_id)
        case BadModels(always=always, sometimes=sometimes, share=share):
            world.troubles.fail_always.update(cluster.ids[:always])
            drawn = cluster.ids[always : always + sometimes]
            world.troubles.fail_sometimes.update(dict.fromkeys(drawn, share))
        case RouterCrash(number=number):
            cluster.crash_router(number)
        case _:
            assert_never(fault)
