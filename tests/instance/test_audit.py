"""What stands in the store under an instance's lease is what it says, whoever changed it."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from mesh import registry
from mesh.core.types import CopyRecord, CopyState
from mesh.instance.publisher import Publisher
from mesh.store.api import Delete, LeaseNotFound, Put
from mesh.store.memory import MemoryStore
from tests.instance.fakes import Rig, running, until, with_policy

OFTEN = with_policy(audit_ms=1_000)


def repairs(rig: Rig) -> list[tuple[str, str]]:
    found = rig.instance.decisions.decisions.recent(100)
    return [(d.reason, d.detail) for d in found if d.kind == "repair"]


async def test_an_instance_without_a_record_gets_it_back(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        key = registry.instance_key(rig.instance.instance_id)
        rig.server.apply([Delete(key)])
        await rig.instance.membership.audit()
        await until(lambda: rig.record())
        assert repairs(rig) == [("missing_in_store", key)]


async def test_a_copy_without_a_record_gets_it_back(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await rig.load("m")
        await until(lambda: rig.copy("m").state is CopyState.LOADED)
        key = registry.copy_key("m", rig.instance.instance_id)
        rig.server.apply([Delete(key)])
        await rig.instance.membership.audit()
        await until(lambda: rig.copy("m"))
        assert rig.instance.decisions.decisions.recent(1)[0].model_id == "m"


async def test_a_record_of_a_copy_that_is_not_there_goes(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        ghost = CopyRecord("ghost", rig.instance.instance_id, CopyState.LOADED)
        lease_id = rig.server.get(registry.instance_key(rig.instance.instance_id)).lease_id
        rig.server.apply([Put(registry.key_of(ghost), registry.encode(ghost), lease_id)])
        await rig.instance.membership.audit()
        await until(lambda: rig.copy("ghost") is None)
        assert repairs(rig) == [("excess_in_store", registry.key_of(ghost))]


async def test_it_is_done_every_audit_ms_without_being_told(tmp_path: Path) -> None:
    async with running(tmp_path, policy=OFTEN) as rig:
        rig.server.apply([Delete(registry.instance_key(rig.instance.instance_id))])
        await until(lambda: rig.record())


async def test_where_all_is_well_nothing_is_written(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await rig.load("m")
        await until(lambda: rig.copy("m").state is CopyState.LOADED)
        await until(lambda: not rig.instance.publisher._dirty)
        before = rig.server.revision
        assert await rig.instance.publisher.audit() == ((), ())
        assert rig.server.revision == before


async def test_a_store_that_is_away_is_audited_another_time(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.server.go_away()
        await rig.instance.membership.audit()
        assert repairs(rig) == []


async def publisher() -> tuple[MemoryStore, Publisher]:
    store = MemoryStore()
    subject = Publisher(store, "i", flush_delay_s=0)
    subject.use_lease(await store.lease(10_000))
    return store, subject


async def test_what_is_not_written_yet_is_not_missing() -> None:
    _, subject = await publisher()
    subject.put_leased("a", b"1")
    assert await subject.audit() == ((), ())


async def test_a_claim_whose_answer_is_on_its_way_is_no_excess() -> None:
    store, subject = await publisher()
    store.server.apply([Put(registry.model_key("m"), b"{}")])
    record = CopyRecord("m", "i", CopyState.LOADING)
    claim = asyncio.create_task(subject.claim(record, store.server.revision))
    while store.server.get(registry.key_of(record)) is None:  # noqa: ASYNC110
        await asyncio.sleep(0)
    # It stands there, and the claim's task may not have heard of it: either way it stays.
    assert (await subject.audit())[1] == ()
    await claim
    await subject.flush()
    assert store.server.get(registry.key_of(record)) is not None


async def test_a_lease_found_gone_by_an_audit_is_reported_as_gone() -> None:
    store, subject = await publisher()
    lease_id = subject._lease.lease_id
    store.leases.clear()  # its owner does not hear of it
    store.server.expire_lease(lease_id)
    with pytest.raises(LeaseNotFound):
        await subject.audit()
    assert subject.lease_gone.is_set()
