"""What all parts of a simulated mesh share: its settings, its clock, its store, its books.

``Settings`` is a run in one printable value: with the workload and the seed it replays the run.
The parts find each other through ``World``; it decides nothing.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.sim.engine import Engine, Trace
from bench.sim.store import SimStore
from mesh.core.errors import Code, LoadFailed, MeshError
from mesh.core.policy import Policy

if TYPE_CHECKING:
    from bench.sim.checks import Checks
    from bench.sim.instance import SimInstance
    from bench.sim.neighbours import Neighbours
    from bench.sim.router import SimRouter
    from bench.sim.tables import Stats

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Settings:
    """Durations are milliseconds. Ways are one way; what a call takes is the two of them."""

    seed: int = 1
    instances: int = 10
    routers: int = 2
    capacity_bytes: int = 300 * MIB
    zones: int = 1
    network_ms: float = 0.3  # router to instance
    store_ms: float = 1.5  # anybody to the store
    watch_ms: float = 3.0  # from a write to a view
    connect_ms: float = 1.0  # until a refused connection is known
    service_ms: float = 5.0  # a request in an instance
    unload_ms: float = 30.0
    fetch_share: float = 0.7  # of a load: the rest is the runtime's
    tick_ms: float = 500.0  # an instance looks whether it has something to say
    restart_ms: float = 2_000.0  # from a crash to the next life
    deadline_ms: float = 0.0  # of every request; 0: none
    size_known_share: float = 1.0  # of the models, from an earlier load
    size_error_share: float = 0.0  # by which a prediction may be too small
    settle_max_ms: float = 600_000.0  # after the last request, for all to come to rest
    wanting: int = 0  # the first so many models are to have two copies
    pinned: int = 0  # the next so many are to have one pinned copy
    scaling: bool = True  # whether instances look at the numbers of copies
    check_every: int = 4_096  # events of caches between two full validations; 1: each
    keep_trace: bool = False
    policy: Policy = field(default_factory=Policy)


@dataclass(slots=True)
class Troubles:
    """What the faults have changed; everything else is as usual."""

    fail_always: set[str] = field(default_factory=set)
    fail_sometimes: dict[str, float] = field(default_factory=dict)  # model -> probability
    load_factor: dict[str, float] = field(default_factory=dict)  # instance -> times as long
    # Instances have gone or did not answer: then two loads of one model may overlap.
    excuse: bool = False

    def as_fast_again(self, instance_id: str) -> None:
        self.load_factor.pop(instance_id, None)


class Costs:
    """What a model is and what its load takes, by id."""

    def __init__(self, size_bytes: Mapping[str, int], load_ms: Mapping[str, int]) -> None:
        self.size_bytes = size_bytes
        self.load_ms = load_ms


class World:
    """Made by ``bench.sim.cluster``, which also sets what is only declared here."""

    stats: Stats
    checks: Checks
    neighbours: Neighbours
    routers: list[SimRouter]
    numbers: dict[str, int]  # of the models

    def __init__(self, settings: Settings, costs: Costs) -> None:
        self.settings = settings
        self.policy = settings.policy
        self.costs = costs
        self.engine = Engine()
        self.trace = Trace(self.engine, keep=settings.keep_trace)
        self.store = SimStore(self.engine)
        self.random = random.Random(settings.seed)
        self.troubles = Troubles()
        self.instances: dict[str, SimInstance] = {}  # also those that have gone
        self.routers = []

    def load_failure(self, model_id: str) -> MeshError | None:
        """How this try to load it ends: a model is broken, or the world was for a moment."""
        troubles = self.troubles
        if model_id in troubles.fail_always:
            return LoadFailed(f"model {model_id!r} is broken")
        share = troubles.fail_sometimes.get(model_id, 0.0)
        if share and self.random.random() < share:
            return LoadFailed("the source hung up", code=Code.UNAVAILABLE)
        return None
