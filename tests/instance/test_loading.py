"""Loads: shared, claimed once, published after their answer, and never over capacity."""

from __future__ import annotations

import asyncio
import errno
import threading
from pathlib import Path

import pytest

from mesh import registry
from mesh.core.cache_check import validate
from mesh.core.errors import Code, LoadFailed
from mesh.core.types import CopyState, LoadPriority
from mesh.instance.answers import LoadOutcome
from tests.instance.fakes import MIB, running, until, with_policy


async def test_a_load_is_claimed_answered_and_then_published(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.source.gates["m"] = asyncio.Event()
        load = asyncio.create_task(rig.load("m"))
        await until(lambda: rig.copy("m"))
        assert rig.copy("m").state is CopyState.LOADING
        rig.source.gates["m"].set()
        answer = await load
        assert answer.outcome is LoadOutcome.LOADED
        assert answer.size_bytes == MIB
        assert rig.copy("m").state is CopyState.LOADING  # the answer was first
        await until(lambda: rig.copy("m").state is CopyState.LOADED)
        assert rig.copy("m").size_bytes == MIB
        assert rig.copy("m").claimed_at_ms > 0


async def test_everybody_who_waits_shares_one_load(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        answers = await asyncio.gather(*(rig.load("m") for _ in range(20)))
        assert {a.outcome for a in answers} == {LoadOutcome.LOADED}
        assert rig.runtime.loading == ["m"]
        assert rig.source.fetched == ["m"]


async def test_cancelling_a_waiter_cancels_no_load(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.source.gates["m"] = asyncio.Event()
        first = asyncio.create_task(rig.load("m"))
        second = asyncio.create_task(rig.load("m"))
        await until(lambda: rig.source.fetched)
        first.cancel()
        await asyncio.gather(first, return_exceptions=True)
        rig.source.gates["m"].set()
        assert (await second).outcome is LoadOutcome.LOADED
        assert rig.source.cancelled == []


async def test_cancelling_the_only_waiter_cancels_no_load(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.source.gates["m"] = asyncio.Event()
        only = asyncio.create_task(rig.load("m"))
        await until(lambda: rig.source.fetched)
        only.cancel()
        rig.source.gates["m"].set()
        await until(lambda: "m" in rig.pod.servables)


async def test_a_claim_that_came_too_late_names_the_holder_and_loads_nothing(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        seen = rig.server.revision
        await rig.store.put(registry.copy_key("m", "other"), b'{"version":1,"state":"LOADING"}')
        answer = await rig.load("m", revision=seen)
        assert answer.outcome is LoadOutcome.CLAIMED_ELSEWHERE
        assert answer.claimed_instance_id == "other"
        assert answer.copy_revision == rig.server.revision
        assert rig.source.fetched == []
        assert rig.copy("m") is None


async def test_two_instances_asked_at_once_cause_one_load(tmp_path: Path) -> None:
    async with running(tmp_path) as one, running(tmp_path, store=one.store.peer()) as two:
        one.register("m")
        revision = one.server.revision
        answers = await asyncio.gather(
            one.load("m", revision=revision), two.load("m", revision=revision)
        )
        outcomes = sorted(answer.outcome for answer in answers)
        assert outcomes == [LoadOutcome.LOADED, LoadOutcome.CLAIMED_ELSEWHERE]
        assert len(one.runtime.loading + two.runtime.loading) == 1


async def test_a_model_that_is_not_registered_is_not_found_and_claims_nothing(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        answer = await rig.load("nobody")
        assert (answer.outcome, answer.code) == (LoadOutcome.FAILED, Code.NOT_FOUND)
        assert "nobody" in answer.message
        assert rig.server.keys("copies/") == []


async def test_a_corrupt_artifact_is_recorded_with_its_cause_until_its_expiry(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.runtime.load_faults["m"] = [LoadFailed("the file is no model")]
        answer = await rig.load("m")
        assert (answer.outcome, answer.code) == (
            LoadOutcome.FAILED,
            Code.FAILED_PRECONDITION,
        )
        failure = rig.failure("m")  # in the store before the answer
        assert failure.message == "the file is no model"
        assert failure.code == "FAILED_PRECONDITION"
        lasts_ms = failure.expires_at_ms - failure.failed_at_ms
        assert lasts_ms == rig.policy.load_failure_expiry_ms
        assert rig.copy("m") is None
        assert rig.source.held["m"] == 0


async def test_what_the_world_is_at_fault_for_expires_soon(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.source.faults["m"] = [OSError(errno.ENOSPC, "No space left on device")]
        answer = await rig.load("m")
        assert answer.code is Code.UNAVAILABLE
        failure = rig.failure("m")
        assert (
            failure.expires_at_ms - failure.failed_at_ms == rig.policy.transient_failure_expiry_ms
        )


async def test_a_router_that_has_not_seen_the_failure_gets_it_again_without_a_load(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        before = rig.server.revision
        rig.runtime.load_faults["m"] = [LoadFailed("bad")]
        await rig.load("m", revision=before)
        again = await rig.load("m", revision=before)
        assert (again.outcome, again.message) == (LoadOutcome.FAILED, "bad")
        assert len(rig.runtime.loading) == 1
        later = await rig.load("m")  # this one has seen it, and wants to try
        assert later.outcome is LoadOutcome.LOADED


async def test_an_unexpected_error_of_a_runtime_is_a_failed_load_with_its_text(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.runtime.load_faults["m"] = [ZeroDivisionError("oops")]
        answer = await rig.load("m")
        assert answer.code is Code.FAILED_PRECONDITION
        assert "ZeroDivisionError: oops" in answer.message


async def test_a_model_larger_than_the_capacity_is_final_and_says_both_sizes(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.runtime.sizes["m"] = (11 * MIB, 11 * MIB)
        answer = await rig.load("m")
        assert answer.code is Code.FAILED_PRECONDITION
        assert str(11 * MIB) in answer.message
        assert str(10 * MIB) in answer.message
        assert rig.runtime.loading == []
        assert rig.failure("m") is not None


async def test_the_least_recently_used_copy_makes_room(tmp_path: Path) -> None:
    policy = with_policy(eviction_order="lru")
    async with running(tmp_path, capacity_bytes=4 * MIB, policy=policy) as rig:
        for name in "abc":
            rig.register(name)
            assert (await rig.load(name)).outcome is LoadOutcome.LOADED
            rig.pod.servables[name].use.last_used_at_ms += 1  # its first request
        rig.pod.servables["a"].use.last_used_at_ms += 1_000
        for name in "de":
            rig.register(name)
            assert (await rig.load(name)).outcome is LoadOutcome.LOADED
        await until(lambda: rig.runtime.unloaded)
        assert rig.runtime.unloaded[0] == "b"
        await until(lambda: rig.copy("b") is None)


async def test_capacity_is_never_exceeded_in_a_storm_of_loads(tmp_path: Path) -> None:
    async with running(tmp_path, capacity_bytes=8 * MIB, policy=with_policy(load_slots=4)) as rig:
        names = [f"m{i}" for i in range(40)]
        for index, name in enumerate(names):
            rig.register(name)
            size = (1 + index % 3) * MIB
            rig.runtime.sizes[name] = (size, size)
        answers = await asyncio.gather(*(rig.load(name) for name in names))
        assert {a.outcome for a in answers} == {LoadOutcome.LOADED}
        assert rig.runtime.most_held_bytes <= 8 * MIB
        assert len(rig.runtime.loading) == 40
        validate(rig.pod.cache)
        await until(lambda: not rig.pod.cache.loading_count)
        here = {name for name in names if name in rig.pod.servables}
        await until(
            lambda: (
                {name for name in names if rig.copy(name) is not None} == here
                and all(rig.copy(name).state is CopyState.LOADED for name in here)
            )
        )


async def test_a_measured_size_goes_into_the_record_for_the_next_load(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.runtime.sizes["m"] = (MIB, 3 * MIB)
        await rig.load("m")
        key = registry.model_key("m")
        await until(
            lambda: registry.decode(key, rig.server.get(key).value).size_bytes_measured == 3 * MIB
        )


async def test_a_load_that_hangs_times_out_and_its_thread_is_not_waited_for(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m", load_timeout_ms=50)
        rig.register("n")
        rig.runtime.load_gates["m"] = threading.Event()
        answer = await rig.load("m")
        assert (answer.outcome, answer.code) == (LoadOutcome.FAILED, Code.UNAVAILABLE)
        assert "time-out" in answer.message
        assert rig.copy("m") is None
        assert rig.pod.cache.used_bytes == MIB  # what the thread may hold still counts
        again = await rig.load("m")
        assert again.outcome is LoadOutcome.REJECTED
        assert (await rig.load("n")).outcome is LoadOutcome.LOADED
        rig.runtime.load_gates["m"].set()
        await until(lambda: rig.pod.cache.get("m") is None)
        assert rig.runtime.unloaded == ["m"]


async def test_deleting_a_model_while_it_is_fetched_stops_the_fetch(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.source.gates["m"] = asyncio.Event()
        load = asyncio.create_task(rig.load("m"))
        await until(lambda: rig.source.fetched)
        rig.unregister("m")
        answer = await load
        assert answer.code is Code.NOT_FOUND
        await until(lambda: rig.pod.cache.get("m") is None)
        assert rig.source.cancelled == ["m"]
        assert rig.failure("m") is None
        await until(lambda: rig.copy("m") is None)


async def test_unload_answers_when_the_copy_is_gone(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await rig.load("m")
        assert await rig.pod.unload("m") is True
        assert rig.runtime.unloaded == ["m"]
        assert await rig.pod.unload("m") is False
        await until(lambda: rig.copy("m") is None)


async def test_unload_of_a_copy_that_is_only_queued_answers_at_once(tmp_path: Path) -> None:
    async with running(tmp_path, policy=with_policy(load_slots=1)) as rig:
        rig.register("first")
        rig.register("m")
        rig.source.gates["first"] = asyncio.Event()
        loads = [asyncio.create_task(rig.load(name)) for name in ("first", "m")]
        await until(lambda: rig.pod.cache.get("first") and rig.pod.cache.get("m"))
        unload = asyncio.create_task(rig.pod.unload("m", "because"))
        await asyncio.sleep(0)
        assert unload.done()  # or a copy that comes next would be waited for
        rig.source.gates["first"].set()
        assert [answer.outcome for answer in await asyncio.gather(*loads)] == [
            LoadOutcome.LOADED,
            LoadOutcome.REJECTED,
        ]
        await rig.load("m")
        rig.pod.deleted("m")  # for another reason than the one that was given before
        recent = rig.instance.decisions.decisions.recent(10)
        unloads = [d for d in recent if d.kind == "unload"]
        assert [(d.reason, "because" in d.detail) for d in unloads] == [("deleted", False)]


async def test_a_load_that_comes_while_the_copy_is_unloaded_waits_for_that(
    tmp_path: Path,
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await rig.load("m")
        rig.runtime.unload_gates["m"] = threading.Event()
        unload = asyncio.create_task(rig.pod.unload("m"))
        await until(lambda: "m" not in rig.pod.servables)
        load = asyncio.create_task(rig.load("m"))
        await until(lambda: rig.copy("m") is None)
        rig.runtime.unload_gates["m"].set()
        assert (await load).outcome is LoadOutcome.LOADED
        await unload
        await until(lambda: rig.copy("m").state is CopyState.LOADED)


async def test_an_unload_that_raises_still_frees_its_memory(tmp_path: Path) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        await rig.load("m")
        rig.runtime.unload_faults["m"] = [RuntimeError("stuck")]
        await rig.pod.unload("m")
        assert rig.pod.cache.used_bytes == 0
        assert rig.instance.metrics.value("unloadmodel_failure") == 1


async def test_a_proactive_load_evicts_nothing_and_an_awaited_one_does(
    tmp_path: Path,
) -> None:
    policy = with_policy(load_slots=1, eviction_order="lru")
    async with running(tmp_path, capacity_bytes=5 * MIB // 2, policy=policy) as rig:
        for name in "abc":
            rig.register(name, size_bytes_stated=MIB)
        await rig.load("a")
        await rig.load("b")
        refused = await rig.load("c", priority=LoadPriority.PROACTIVE)
        assert refused.outcome is LoadOutcome.REJECTED
        assert rig.runtime.unloaded == []
        assert rig.copy("c") is None
        assert (await rig.load("c")).outcome is LoadOutcome.LOADED
        assert rig.runtime.unloaded == ["a"]


@pytest.mark.parametrize("loads", [True, False])
async def test_an_artifact_that_cannot_be_released_keeps_no_waiter(
    tmp_path: Path, loads: bool, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as rig:
        rig.register("m")
        rig.source.release_faults["m"] = [OSError("unlink failed")]
        if not loads:
            rig.runtime.load_faults["m"] = [ValueError("bad magic")]
        answer = await rig.load("m")
        assert answer.outcome is (LoadOutcome.LOADED if loads else LoadOutcome.FAILED)
        assert ("m" in rig.pod.servables) is loads
        assert rig.pod.loader.jobs == {}
        assert "was not released" in caplog.text
