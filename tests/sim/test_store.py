"""The simulated store: claims, leases, pauses, watches."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from bench.sim.engine import Engine
from bench.sim.store import Change, Gone, LeaseGone, SimStore
from mesh.core.errors import NotFound, Unavailable
from mesh.core.types import CopyRecord, CopyState, ModelRecord


def claim_of(instance_id: str) -> CopyRecord:
    return CopyRecord("m", instance_id, CopyState.LOADING)


@pytest.fixture
def store() -> SimStore:
    made = SimStore(Engine())
    made.write([ModelRecord("m", "onnx")])
    return made


def test_the_first_of_two_claims_of_the_same_revision_stands(store: SimStore) -> None:
    seen = store.revision
    a, b = store.lease("a"), store.lease("b")
    revision, holder = store.claim(claim_of("a"), seen, a)
    assert (revision, holder) == (seen + 1, None)
    assert store.claim(claim_of("b"), seen, b) == (0, ("a", seen + 1))
    assert store.claim(claim_of("b"), store.revision, b)[1] is None  # it has seen the other


def test_a_copy_that_has_gone_stands_in_no_claims_way(store: SimStore) -> None:
    seen = store.revision
    lease = store.lease("a")
    store.claim(claim_of("a"), seen, lease)
    store.write([Gone(CopyRecord, "m", "a")])
    assert store.claim(claim_of("a"), seen, lease)[1] is None


def test_a_model_that_is_not_registered_cannot_be_claimed(store: SimStore) -> None:
    store.write([Gone(ModelRecord, "m")])
    with pytest.raises(NotFound):
        store.claim(claim_of("a"), store.revision, store.lease("a"))


def test_what_stands_under_a_lease_goes_with_it(store: SimStore) -> None:
    lease = store.lease("a")
    store.claim(claim_of("a"), store.revision, lease)
    store.not_kept_alive(lease, 8_000.0, 10_000.0)
    store.engine.run_until(7_999.0)
    assert "m" in store.copies
    store.engine.run_until(8_001.0)
    assert "m" not in store.copies
    with pytest.raises(LeaseGone):
        store.write([claim_of("a")], lease)


def test_who_is_back_in_time_keeps_the_lease(store: SimStore) -> None:
    lease = store.lease("a")
    store.not_kept_alive(lease, 8_000.0, 10_000.0)
    store.engine.run_until(5_000.0)
    assert store.kept_alive(lease)
    store.engine.run_until(60_000.0)
    assert lease.alive


def test_no_lease_expires_while_the_store_is_away_and_all_begin_anew(store: SimStore) -> None:
    lease = store.lease("a")
    store.not_kept_alive(lease, 5_000.0, 10_000.0)
    store.pause()
    with pytest.raises(Unavailable):
        store.write([claim_of("a")], lease)
    store.engine.run_until(20_000.0)
    store.resume()
    assert lease.alive
    store.engine.run_until(31_000.0)
    assert not lease.alive


def test_watchers_get_every_change_once_in_order_and_late(store: SimStore) -> None:
    got: list[tuple[float, int]] = []

    def consume(changes: Sequence[Change]) -> None:
        got.extend((store.engine.time, revision) for revision, _ in changes)

    store.watch(3.0, consume)
    first = store.revision + 1
    store.write([claim_of("a")])
    store.engine.run_until(1.0)
    store.write([claim_of("b")])
    store.pause()
    store.engine.run_until(50.0)
    assert got == []
    store.resume()
    store.engine.run_until(100.0)
    assert [revision for _, revision in got] == [first, first + 1]
    assert all(at >= 53.0 for at, _ in got)
