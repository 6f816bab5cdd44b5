"""What an instance knows of the others, and what it has them do."""

from __future__ import annotations

from pathlib import Path

from mesh import registry
from mesh.core.types import (
    CopyRecord,
    CopyState,
    FailureRecord,
    InstanceState,
    LoadPriority,
)
from mesh.instance import neighbours
from mesh.store.api import Delete, Put
from tests.instance.fakes import MIB, Rig, until
from tests.instance.test_drain import several


def stand(rig: Rig, *records: CopyRecord | FailureRecord) -> None:
    rig.server.apply([Put(registry.key_of(r), registry.encode(r)) for r in records])


async def test_instances_come_change_and_go(tmp_path: Path) -> None:
    async with several(tmp_path, 2) as (rig, other):
        view, other_id = rig.instance.neighbours.view, other.instance.instance_id
        assert view.instances[other_id].record.address == other.instance.address
        other.instance.state = InstanceState.DRAINING
        other.instance.membership.advertise()
        await until(lambda: not view.instances[other_id].ready)
        await other.instance.membership.leave()
        await until(lambda: other_id not in view.instances)


async def test_a_record_that_cannot_be_read_hides_nobody_else(tmp_path: Path) -> None:
    async with several(tmp_path, 2) as (rig, other):
        rig.server.apply([Put("instances/odd", b"{"), Put("config/odd", b"[]")])
        other.instance.state = InstanceState.DRAINING
        other.instance.membership.advertise()
        view = rig.instance.neighbours.view
        await until(lambda: not view.instances[other.instance.instance_id].ready)
        assert "odd" not in view.instances


async def test_live_settings_are_in_the_view(tmp_path: Path) -> None:
    async with several(tmp_path, 1) as (rig,):
        view = rig.instance.neighbours.view
        constraints = b'{"fake":{"required":["gpu"]}}'
        rig.server.apply([Put(registry.config_key("type_constraints"), constraints)])
        await until(lambda: view.type_constraints)
        assert view.type_constraints["fake"].required == ("gpu",)
        rig.server.apply([Delete(registry.config_key("type_constraints"))])
        await until(lambda: not view.type_constraints)


async def test_copies_and_failures_are_known_when_they_were_read(tmp_path: Path) -> None:
    async with several(tmp_path, 2) as (rig, other):
        other_id = other.instance.instance_id
        stand(
            rig,
            CopyRecord("m", other_id, CopyState.LOADED, size_bytes=5),
            FailureRecord("m", "gone", "UNAVAILABLE", "no", 1, 10**15),
        )
        subject = rig.instance.neighbours
        assert subject.view.copies_of("m") == ()
        view = await subject.read_copies("m")
        assert [c.instance_id for c in view.copies_of("m")] == [other_id]
        assert view.loaded_on("m") == (other_id,)
        assert [f.instance_id for f in view.failures_of("m", 0)] == ["gone"]
        rig.server.apply([Delete(registry.copy_key("m", other_id)), Delete("failures/m/gone")])
        view = await subject.read_copies("m")
        assert view.copies_of("m") == ()
        assert view.failures_of("m", 0) == ()


async def test_an_instance_that_goes_takes_along_what_was_read_of_its_copies(
    tmp_path: Path,
) -> None:
    async with several(tmp_path, 2) as (rig, other):
        subject, other_id = rig.instance.neighbours, other.instance.instance_id
        stand(
            rig,
            CopyRecord("m", other_id, CopyState.LOADED),
            CopyRecord("m", "never seen", CopyState.LOADED),
        )
        await subject.read_copies("m")
        gone = rig.server.get(registry.instance_key(other_id))
        rig.server.apply([Delete(gone.key)])
        await until(lambda: other_id not in subject.view.instances)
        rig.server.apply([Put(gone.key, gone.value)])  # it had lost its lease
        await until(lambda: other_id in subject.view.instances)
        assert subject.view.copies_of("m") == ()
        assert list(subject.view.copied_models()) == []


async def test_only_the_models_looked_at_last_are_remembered(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(neighbours, "MODELS_REMEMBERED", 2)
    async with several(tmp_path, 2) as (rig, other):
        names = ["a", "b", "c"]
        stand(rig, *(CopyRecord(n, other.instance.instance_id, CopyState.LOADED) for n in names))
        for name in names:
            await rig.instance.neighbours.read_copies(name)
        known = [n for n in names if rig.instance.neighbours.view.copies_of(n)]
        assert known == ["b", "c"]


async def test_another_loads_and_unloads_what_it_is_told(tmp_path: Path) -> None:
    async with several(tmp_path, 2) as (rig, other):
        record = rig.register("m", pinned=True)
        subject, other_id = rig.instance.neighbours, other.instance.instance_id
        await subject.read_copies("m")
        loaded = await subject.load_on(
            other_id, record, priority=LoadPriority.COPY, reason="test", size_bytes=MIB, pin=True
        )
        assert loaded
        assert other.pod.cache.get("m").pinned
        assert subject.view.loaded_on("m") == (other_id,)
        assert subject.view.pending_of("m") == ()
        assert await subject.unload_on(other_id, "m", "too many")
        assert "m" not in other.pod.servables
        assert subject.view.copies_of("m") == ()
        noted = other.instance.decisions.decisions.recent(1)[0]
        assert (noted.kind, noted.reason) == ("unload", "asked")
        assert "too many" in noted.detail
        assert not await subject.unload_on(other_id, "m", "again")


async def test_how_a_model_was_used_goes_along(tmp_path: Path) -> None:
    async with several(tmp_path, 2) as (rig, other):
        record = rig.register("m")
        await rig.load("m")
        rig.pod.servables["m"].use.last_used_at_ms = 1_700_000_000_000
        subject = rig.instance.neighbours
        await subject.read_copies("m")
        assert await subject.load_on(
            other.instance.instance_id,
            record,
            priority=LoadPriority.PROACTIVE,
            reason="test",
            size_bytes=MIB,
        )
        assert other.pod.servables["m"].use.last_used_at_ms == 1_700_000_000_000


async def test_a_copy_that_came_since_the_copies_were_read_prevents_another(
    tmp_path: Path,
) -> None:
    async with several(tmp_path, 3) as (rig, other, third):
        record = rig.register("m")
        subject = rig.instance.neighbours
        await subject.read_copies("m")
        await third.load("m")
        assert not await subject.load_on(
            other.instance.instance_id,
            record,
            priority=LoadPriority.COPY,
            reason="test",
            size_bytes=MIB,
        )
        assert other.runtime.loading == []


async def test_who_is_not_there_or_cannot_be_reached_has_done_nothing(tmp_path: Path) -> None:
    async with several(tmp_path, 2) as (rig, other):
        record = rig.register("m")
        subject, other_id = rig.instance.neighbours, other.instance.instance_id
        ask = {"priority": LoadPriority.COPY, "reason": "test", "size_bytes": MIB}
        assert not await subject.load_on("nobody", record, **ask)
        await other.instance.server.close()
        assert not await subject.load_on(other_id, record, **ask)
        assert not await subject.unload_on(other_id, "m", "test")
        assert subject.view.pending_of("m") == ()


async def test_connections_to_instances_that_have_gone_are_closed(tmp_path: Path) -> None:
    async with several(tmp_path, 2) as (rig, other):
        subject = rig.instance.neighbours
        await subject.unload_on(other.instance.instance_id, "m", "test")
        assert subject._lines
        await other.instance.membership.leave()
        await until(lambda: not subject._lines)


async def test_connections_that_nobody_uses_are_closed_and_made_again(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.setattr(neighbours, "IDLE_S", 0.02)
    async with several(tmp_path, 2) as (rig, other):
        subject, other_id = rig.instance.neighbours, other.instance.instance_id
        rig.register("m")
        await other.load("m")
        await subject.unload_on(other_id, "nothing", "test")
        await until(lambda: not subject._lines)
        assert await subject.unload_on(other_id, "m", "test")
