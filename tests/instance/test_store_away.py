"""Loads while the store is away, or answers too late: by the record that came along, once it must
be so, and never past what a store that answers says."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mesh import registry
from mesh.core.errors import Code
from mesh.core.types import CopyRecord, CopyState
from mesh.instance import claims
from mesh.instance.answers import LoadOutcome
from mesh.instance.publisher import Claimed, ClaimedElsewhere, Publisher
from mesh.store.api import Put, StoreUnavailable
from mesh.store.memory import MemoryStore
from tests.instance.fakes import running, until


async def test_a_miss_is_loaded_by_the_record_that_came_along_and_published_later(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        record = registry.encode(rig.register("m"))
        rig.server.go_away()
        answer = await rig.load("m", record=record)
        assert (answer.outcome, answer.copy_revision) == (LoadOutcome.LOADED, 0)
        assert rig.copy("m") is None
        rig.server.come_back()
        await until(lambda: rig.copy("m") and rig.copy("m").state is CopyState.LOADED)
        await until(lambda: not rig.pod.claims.unconfirmed)
        assert "m" in rig.pod.servables


async def test_once_the_store_is_known_to_be_away_it_is_not_asked(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        records = {name: registry.encode(rig.register(name)) for name in "ab"}
        rig.server.go_away()
        await rig.load("a", record=records["a"])
        assert rig.instance.publisher.away
        rig.server.hold_calls()  # whoever asked now would hang
        answer = await rig.load("b", record=records["b"])
        assert answer.outcome is LoadOutcome.LOADED
        rig.server.release_calls()
        rig.server.come_back()
        await until(lambda: rig.copy("a") and rig.copy("b"))
        assert not rig.instance.publisher.away


async def test_a_store_that_does_not_answer_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "STORE_PATIENCE_S", 0.05)
    async with running(tmp_path) as rig:
        record = registry.encode(rig.register("m"))
        rig.server.hold_calls()
        answer = await rig.load("m", record=record)
        assert answer.outcome is LoadOutcome.LOADED
        rig.server.release_calls()
        await until(lambda: rig.copy("m") and rig.copy("m").state is CopyState.LOADED)


async def test_without_a_record_a_load_is_refused_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(claims, "STORE_PATIENCE_S", 0.05)
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.server.hold_calls()
        answer = await rig.load("m")
        assert answer.outcome is LoadOutcome.REJECTED
        rig.server.release_calls()
        await until(lambda: not rig.instance.publisher.away)
        assert rig.copy("m") is None
        assert rig.runtime.loading == []


async def test_a_claim_that_was_made_although_no_answer_came_is_our_own(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        record = registry.encode(rig.register("m"))
        await until(lambda: rig.instance.publisher.connected)
        before = rig.server.revision
        rig.server.fail_next(2, applied=True)  # the read of the record and the claim
        answer = await rig.load("m", record=record, revision=before)
        assert answer.outcome is LoadOutcome.LOADED
        await until(lambda: rig.copy("m") and rig.copy("m").state is CopyState.LOADED)
        assert rig.runtime.loading == ["m"]


async def test_a_lease_that_was_lost_unseen_is_waited_for_and_the_claim_made_anew(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        record = registry.encode(rig.register("m"))
        rig.server.expire_lease(
            rig.server.get(registry.instance_key(rig.instance.instance_id)).lease_id
        )
        answer = await rig.load("m", record=record)
        assert answer.outcome is LoadOutcome.LOADED
        assert answer.copy_revision > 0  # claimed
        await until(lambda: rig.copy("m") and rig.record())


async def test_a_store_that_answers_is_believed_about_a_deleted_model(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        record = registry.encode(rig.register("m"))
        rig.unregister("m")
        answer = await rig.load("m", record=record)
        assert (answer.outcome, answer.code) == (LoadOutcome.FAILED, Code.NOT_FOUND)
        assert rig.runtime.loading == []


async def test_a_model_deleted_before_goes_when_the_store_is_back(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        record = registry.encode(rig.register("m"))
        rig.unregister("m")
        await until(lambda: rig.instance.membership.joined.is_set())
        rig.server.go_away()
        await rig.load("m", record=record)  # of a router that has not heard of it
        assert "m" in rig.pod.servables
        rig.server.come_back()
        await until(lambda: rig.runtime.unloaded == ["m"])
        await until(lambda: rig.copy("m") is None)


async def test_a_claim_of_somebody_else_stands_while_the_store_answers(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        record = registry.encode(rig.register("m"))
        seen = rig.server.revision
        other = CopyRecord("m", "other", CopyState.LOADING)
        rig.server.apply([Put(registry.key_of(other), registry.encode(other))])
        answer = await rig.load("m", record=record, revision=seen)
        assert answer.outcome is LoadOutcome.CLAIMED_ELSEWHERE
        assert answer.claimed_instance_id == "other"


async def test_a_failed_load_is_answered_at_once_while_the_store_is_away(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        record = registry.encode(rig.register("m"))
        rig.server.go_away()
        rig.runtime.load_faults["m"] = [ValueError("bad magic")]
        answer = await rig.load("m", record=record)
        assert (answer.outcome, answer.code) == (LoadOutcome.FAILED, Code.FAILED_PRECONDITION)
        rig.server.come_back()
        await until(lambda: rig.failure("m") is not None)
        await until(lambda: rig.copy("m") is None)


# ---- the claim itself ----------------------------------------------------------------------------


def copy_of(instance_id: str) -> CopyRecord:
    return CopyRecord("m", instance_id, CopyState.LOADING)


async def claiming(*held_by: str) -> tuple[MemoryStore, Publisher]:
    """A publisher of instance "i", a registered model, and copies that were there before."""
    store = MemoryStore()
    subject = Publisher(store, "i", flush_delay_s=0)
    subject.use_lease(await store.lease(10_000))
    store.server.apply([Put(registry.model_key("m"), b"{}")])
    for instance_id in held_by:
        record = copy_of(instance_id)
        store.server.apply([Put(registry.key_of(record), registry.encode(record))])
    return store, subject


async def test_a_claim_that_may_have_been_made_is_not_taken_for_somebody_elses() -> None:
    store, subject = await claiming("first")
    seen = store.server.revision
    store.server.fail_next(1, applied=True)
    with pytest.raises(StoreUnavailable):
        await subject.claim(copy_of("i"), seen)
    subject.put_copy(copy_of("i"))  # what the load went on with
    await subject.flush()
    again = await subject.claim(copy_of("i"), seen)
    assert isinstance(again, Claimed)


async def test_but_somebody_elses_beside_it_is() -> None:
    store, subject = await claiming()
    seen = store.server.revision
    subject.put_copy(copy_of("i"))
    await subject.flush()
    store.server.apply([Put(registry.copy_key("m", "other"), registry.encode(copy_of("other")))])
    subject.put_leased("elsewhere", b"")
    claim = await subject.claim(copy_of("i"), seen)
    assert isinstance(claim, ClaimedElsewhere)
    assert claim.instance_id == "other"


async def test_a_claim_given_up_midway_is_put_right_by_the_next_flush() -> None:
    store, subject = await claiming()
    store.server.hold_calls()
    claim = asyncio.create_task(subject.claim(copy_of("i"), store.server.revision))
    await asyncio.sleep(0)
    claim.cancel()
    await asyncio.gather(claim, return_exceptions=True)
    store.server.release_calls()
    await subject.flush()
    assert store.server.keys("copies/") == []
