"""Two routers and one cold model asked 200 times at once: one load, and everyone is answered."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.chaos.rig import Rig
from tests.e2e.asking import Asker, eventually, isvc, total

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

REQUESTS = 200
ROUNDS = 3


def test_200_first_requests_over_two_routers_cause_exactly_one_load(
    rig: Rig, chaos_samples: Path
) -> None:
    names = [f"once-{number}" for number in range(ROUNDS)]
    uri = (chaos_samples / "digits-0001").as_uri()
    with Asker(rig.address) as ask:
        for name in names:
            ask.apply(isvc(name, uri))
    for name in names:
        missed = [total([router], "mesh_misses_total") for router in rig.routers]
        assert rig.ask_at_once(name, REQUESTS) == [None] * REQUESTS
        eventually(lambda name=name: rig.loads_of(name), "the load in a log")
        for router, count in zip(rig.routers, missed, strict=True):
            assert total([router], "mesh_misses_total") > count, "both routers had to do with it"
    assert [rig.loads_of(name) for name in names] == [1] * ROUNDS
    with Asker(rig.address) as ask:
        assert all(ask.delete(name) for name in names)
