"""Whatever goes wrong, whenever: nothing is broken, and all comes to rest."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bench.sim import workloads
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
from tests.sim.meshes import SMALL, small

AT_MS = st.integers(0, 40).map(lambda s: s * 1_000.0)
FOR_MS = st.integers(1, 25).map(lambda s: s * 1_000.0)
PLACE = st.integers(0, 2)

FAULTS: st.SearchStrategy[list[Fault]] = st.lists(
    st.one_of(
        st.builds(Crash, AT_MS, PLACE, st.booleans()),
        st.builds(Stop, AT_MS, PLACE, FOR_MS),
        st.builds(Drain, AT_MS, PLACE, st.booleans()),
        st.builds(StoreAway, AT_MS, FOR_MS),
        st.builds(SlowLoads, AT_MS, PLACE, FOR_MS, st.floats(2.0, 30.0)),
        st.builds(BadModels, AT_MS, st.integers(0, 3), st.integers(0, 10)),
        st.builds(RouterCrash, AT_MS, st.integers(0, 1)),
        st.builds(RestartAll, AT_MS),
    ),
    max_size=5,
)
SHAPE = workloads.Shape(models=40, requests=400, per_s=10.0, mixed=True)


@settings(
    max_examples=20,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
@given(
    faults=FAULTS,
    seed=st.integers(0, 10_000),
    known=st.sampled_from([0.0, 1.0]),
    error=st.sampled_from([0.0, 0.5]),
    zones=st.integers(1, 2),
)
def test_safety_and_rest(
    faults: list[Fault], seed: int, known: float, error: float, zones: int
) -> None:
    mesh = replace(
        SMALL,
        instances=3,
        zones=zones,
        capacity_bytes=900 * (1 << 20),
        size_known_share=known,
        size_error_share=error,
    )
    small(faults, settings=mesh, shape=SHAPE, seed=seed)
