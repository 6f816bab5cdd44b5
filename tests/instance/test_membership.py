"""Lease lost, store away, model deleted, drain: the instance stays what the store says it is."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from pathlib import Path

from mesh import registry
from mesh.core.errors import Code
from mesh.core.types import CopyState, InstanceState
from mesh.instance.answers import LoadOutcome
from tests.instance.fakes import MIB, Rig, running, until, with_policy


async def test_a_started_instance_says_who_it_is(tmp_path: Path) -> None:
    async with running(tmp_path, zone="z1", labels=("a",)) as rig:
        record = rig.record()
        assert record.state is InstanceState.READY
        assert record.address == rig.instance.address
        assert record.capacity_bytes == 10 * MIB
        assert record.model_types == ("fake",)
        assert (record.zone, record.labels) == ("z1", ("a",))


async def test_an_instances_id_is_fresh_at_each_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    assert rig.make().instance_id != rig.make().instance_id


async def test_a_lost_lease_is_replaced_and_everything_published_anew(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await rig.load("m")
        await until(lambda: rig.copy("m").state is CopyState.LOADED)
        old = rig.server.get(registry.instance_key(rig.instance.instance_id)).lease_id
        rig.server.expire_lease(old)
        assert rig.copy("m") is None
        assert "m" in rig.pod.servables  # serves on
        await until(lambda: rig.record() and rig.copy("m"))
        assert rig.copy("m").state is CopyState.LOADED
        assert rig.server.get(registry.copy_key("m", rig.instance.instance_id)).lease_id != old


async def test_a_claim_under_way_survives_a_lost_lease(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.source.gates["m"] = asyncio.Event()
        load = asyncio.create_task(rig.load("m"))
        await until(lambda: rig.copy("m") and rig.source.fetched)
        rig.server.expire_lease(
            rig.server.get(registry.instance_key(rig.instance.instance_id)).lease_id
        )
        await until(lambda: rig.copy("m"))
        rig.source.gates["m"].set()
        assert (await load).outcome is LoadOutcome.LOADED
        await until(lambda: rig.copy("m").state is CopyState.LOADED)


async def test_while_the_store_is_away_loaded_models_stay_and_loads_say_try_again(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.register("n")
        await rig.load("m")
        rig.server.go_away()
        answer = await rig.load("n")
        assert answer.outcome is LoadOutcome.REJECTED  # no failure of the model
        assert "m" in rig.pod.servables
        rig.server.come_back()
        await until(lambda: rig.copy("m") and rig.copy("m").state is CopyState.LOADED)
        assert (await rig.load("n")).outcome is LoadOutcome.LOADED


async def test_a_claim_whose_answer_was_lost_leaves_no_orphan(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        # The first writes pass, or the faults would be theirs.
        await until(lambda: rig.record() is not None and not rig.instance.publisher._dirty)
        rig.server.fail_next(2, applied=True)
        answer = await rig.load("m")
        assert answer.outcome is LoadOutcome.REJECTED
        await until(lambda: rig.copy("m") is None)
        assert (await rig.load("m")).outcome is LoadOutcome.LOADED


async def test_a_deleted_model_finishes_its_requests_and_goes(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await rig.load("m")
        use = rig.pod.servables["m"].use
        use.in_flight += 1
        rig.unregister("m")
        await until(lambda: "m" not in rig.pod.servables)
        assert rig.runtime.unloaded == []
        use.in_flight -= 1
        assert rig.pod.idle_wanted()
        rig.pod.became_idle("m")
        await until(lambda: rig.runtime.unloaded == ["m"])
        await until(lambda: rig.copy("m") is None)


async def test_a_model_deleted_while_watches_were_cut_goes_when_they_are_back(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await rig.load("m")
        rig.server.cut_watches()
        rig.unregister("m")
        rig.server.lose_history()
        rig.server.restore_watches()
        await until(lambda: rig.runtime.unloaded == ["m"])


async def test_a_pin_in_the_record_alone_pins_nothing_and_its_end_unpins(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m", pinned=True, max_concurrency=3)
        await rig.load("m")
        assert rig.pod.servables["m"].max_concurrency == 3
        assert not rig.pod.cache.get("m").pinned  # another copy may be the one that stays
        await rig.load("m", pin=True)
        assert rig.pod.cache.get("m").pinned
        await until(lambda: rig.copy("m").pinned)
        rig.register("m", pinned=False)
        await until(lambda: not rig.pod.cache.get("m").pinned)
        await until(lambda: not rig.copy("m").pinned)


async def test_a_load_that_says_so_pins_the_copy_from_the_start(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m", pinned=True)
        rig.register("n")
        await rig.load("m", pin=True)
        await rig.load("n", pin=True)  # its record knows of no pin (any more)
        await until(lambda: rig.copy("m").state is rig.copy("n").state is CopyState.LOADED)
        assert rig.copy("m").pinned
        assert not rig.copy("n").pinned


async def after_its_claim(rig: Rig, model_id: str, happens: Callable[[], object]) -> None:
    """``happens`` between the claim of the next load and its coming to the cache, and is seen."""
    claim = rig.pod.claims.claim

    async def claim_then(wish, policy):
        ready = await claim(wish, policy)
        happens()
        await until(lambda: rig.pod._flights.get(model_id).told)
        return ready

    rig.pod.claims.claim = claim_then


async def test_a_model_deleted_when_its_load_is_about_to_begin_is_not_loaded(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await after_its_claim(rig, "m", lambda: rig.unregister("m"))
        answer = await rig.load("m")
        assert (answer.outcome, answer.code) == (LoadOutcome.FAILED, Code.NOT_FOUND)
        assert rig.runtime.loading == []
        await until(lambda: rig.copy("m") is None)


async def test_a_record_changed_when_its_load_is_about_to_begin_counts(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await after_its_claim(rig, "m", lambda: rig.register("m", max_concurrency=3))
        await rig.load("m")
        assert rig.pod.servables["m"].max_concurrency == 3


async def test_a_deletion_before_the_present_registration_is_an_old_story(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.server.cut_watches()
        rig.unregister("m")
        rig.register("m")
        await after_its_claim(rig, "m", rig.server.restore_watches)
        assert (await rig.load("m")).outcome is LoadOutcome.LOADED


async def test_a_record_that_changed_while_history_was_lost_counts(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await rig.load("m")
        rig.server.cut_watches()
        rig.register("m", max_concurrency=3)
        rig.server.lose_history()
        rig.server.restore_watches()
        await until(lambda: rig.pod.servables["m"].max_concurrency == 3)


async def test_last_uses_go_to_the_store_in_one_blob(tmp_path: Path) -> None:
    async with running(tmp_path, policy=with_policy(last_used_flush_ms=1)) as rig:
        rig.register("m")
        await rig.load("m", last_used_at_ms=5)
        key = registry.last_used_key(rig.instance.instance_id)
        await until(lambda: rig.server.get(key))
        uses = registry.decode_uses("i", rig.server.get(key).value).last_used_at_ms
        assert uses["m"] == rig.pod.servables["m"].use.last_used_at_ms


async def test_draining_says_so_rejects_loads_and_takes_everything_away(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    await rig.start()
    try:
        rig.register("m")
        rig.register("n")
        await rig.load("m")
        rig.runtime.load_gates["n"] = threading.Event()
        waiting = asyncio.create_task(rig.load("n"))
        await until(lambda: rig.runtime.loading == ["m", "n"])
        drain = asyncio.create_task(rig.instance.drain())
        assert (await waiting).outcome is LoadOutcome.REJECTED
        rig.runtime.open_all()
        await drain
        assert rig.server.keys("instances/") == []
        assert rig.server.keys("copies/") == []
        assert rig.server.get(registry.last_used_key(rig.instance.instance_id)) is not None
    finally:
        rig.runtime.open_all()
        await rig.instance.close()


async def test_an_instance_waits_for_a_store_that_is_away_at_its_start(tmp_path: Path) -> None:
    rig = Rig(tmp_path)
    rig.server.go_away()
    try:
        await rig.instance.start()
        assert rig.instance.not_ready() == "waiting for the store"
        rig.server.come_back()
        await until(lambda: not rig.instance.not_ready())
    finally:
        await rig.instance.close()
