"""Small simulated meshes: everything is checked after every event."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from bench.sim import workloads
from bench.sim.cluster import Cluster
from bench.sim.faults import Fault
from bench.sim.tables import Outcome
from bench.sim.world import MIB, Settings
from mesh.core.policy import Policy

SMALL = Settings(
    instances=4,
    capacity_bytes=12 * MIB,
    check_every=1,
    keep_trace=True,
    policy=Policy(default_model_size_bytes=MIB, last_used_flush_ms=20_000),
)
SHAPE = workloads.Shape(models=100, requests=1_200, per_s=15.0)


def small(
    faults: Iterable[Fault] = (),
    *,
    settings: Settings = SMALL,
    shape: workloads.Shape = SHAPE,
    seed: int = 1,
) -> tuple[Cluster, Outcome]:
    """80 seconds of a mesh of four; it has come to rest and is checked as a whole."""
    cluster = Cluster(replace(settings, seed=seed), workloads.zipf(shape, 0.9))
    return cluster, cluster.run(faults=faults)
