"""Requests that wait for a place: what wakes them, who goes on waiting, what it costs."""

from __future__ import annotations

import asyncio

import pytest

from mesh.core.errors import Code, MeshError
from mesh.core.policy import Policy
from mesh.core.types import InstanceState, LoadPriority
from mesh.decision_log import DecisionLog
from mesh.registry import decode_model
from protos import mesh_internal_pb2 as internal
from router.loads import WAKE_SLICE, Loads

# Looks again at once when told of a change, and by itself not within a test.
PATIENT = Policy(placement_retry_ms=1, placement_retry_max_ms=1)
ONLY_WHEN_TOLD = Policy(placement_retry_ms=60_000, placement_retry_max_ms=60_000)


def rejected() -> internal.LoadResponse:
    return internal.LoadResponse(outcome="REJECTED", message="no room")


def paused(loads: Loads) -> int:
    return len(loads._paused)


async def test_a_request_waits_for_the_first_instance(world) -> None:
    world.build(PATIENT)
    world.model("m")
    call = world.call("m")
    await world.until(lambda: paused(world.loads))
    assert not call.settled
    world.instance("a")
    world.loads.view_changed()
    await world.until(lambda: call.settled)
    assert call.forwards == ["a:1"]


async def test_it_looks_again_when_nobody_tells_of_a_change(world) -> None:
    world.build(PATIENT)
    world.instance("a")
    world.model("m")
    world.script("a", rejected(), rejected(), rejected())
    call = world.call("m")
    await world.until(lambda: call.settled)
    assert call.forwards == ["a:1"]
    assert world.asked == ["a"] * 4


async def test_a_change_of_the_view_is_looked_at_before_the_time_is_over(world) -> None:
    world.build(ONLY_WHEN_TOLD)
    world.model("m")
    call = world.call("m")
    await world.until(lambda: paused(world.loads))
    world.loads.use_policy(PATIENT)  # so that the change is gathered for a millisecond only
    world.instance("a")
    for _ in range(100):
        world.loads.view_changed()
    await world.until(lambda: call.settled)
    assert call.forwards == ["a:1"]


async def test_more_waiting_loads_than_one_slice_are_all_woken(world) -> None:
    world.build(ONLY_WHEN_TOLD)
    calls = []
    for at in range(2 * WAKE_SLICE + 1):
        world.model(f"m{at}")
        calls.append(world.call(f"m{at}"))
    await world.until(lambda: paused(world.loads) == len(calls))
    world.loads.use_policy(PATIENT)
    world.instance("a")
    world.loads.view_changed()
    await world.until(lambda: all(c.settled for c in calls))
    assert [c.forwards for c in calls] == [["a:1"]] * len(calls)


async def test_after_its_time_the_request_gets_the_reason_and_may_try_again(world) -> None:
    world.build(PATIENT)
    world.model("m")
    call = world.call("m")
    await world.until(lambda: paused(world.loads))
    world.now_ms += world.policy.placement_wait_ms
    await world.until(lambda: call.settled)
    assert call.error.code is Code.UNAVAILABLE
    assert call.error.retry_after_ms
    assert "no serving instance" in call.error.message


async def test_a_request_that_came_later_waits_its_own_time(world) -> None:
    world.build(PATIENT)
    world.model("m")
    first = world.call("m")
    await world.until(lambda: paused(world.loads))
    world.now_ms += world.policy.placement_wait_ms - 1
    second = world.call("m")
    world.now_ms += 1
    await world.until(lambda: first.settled)
    assert first.error is not None
    assert not second.settled
    world.instance("a")
    world.loads.view_changed()
    await world.until(lambda: second.settled)
    assert second.forwards == ["a:1"]


async def test_nobody_waits_for_a_place_when_all_requests_have_gone(world) -> None:
    world.build(ONLY_WHEN_TOLD)
    world.model("m")
    calls = [world.call("m") for _ in range(3)]
    await world.until(lambda: paused(world.loads))
    for call in calls:
        call.finish(int(Code.DEADLINE_EXCEEDED))
    await world.until(lambda: not world.loads.under_way)
    assert paused(world.loads) == 0
    assert world.loads.waiting == 0


async def test_a_load_that_nobody_awaits_does_not_wait_for_a_place(world) -> None:
    world.model("m")
    with pytest.raises(MeshError, match="no serving instance"):
        world.loads.begin("m")
    assert world.loads.under_way == ()
    world.instance("a")
    world.script("a", rejected())
    world.loads.begin("m")
    await world.until(lambda: not world.loads.under_way)
    assert world.asked == ["a"]


async def test_waiting_requests_count_in_the_bounds(world) -> None:
    world.build(Policy(max_waiting_total=2))
    for at in range(3):
        world.model(f"m{at}")
    calls = [world.call(f"m{at}") for at in range(3)]
    assert [c.settled for c in calls] == [False, False, True]
    assert calls[2].error.code is Code.RESOURCE_EXHAUSTED
    assert calls[2].error.retry_after_ms


async def test_shutting_down_ends_the_wait(world) -> None:
    world.build(ONLY_WHEN_TOLD)
    world.model("m")
    call = world.call("m")
    await world.until(lambda: paused(world.loads))
    world.loads.view_changed()
    await world.loads.close()
    assert call.error.code is Code.UNAVAILABLE
    assert paused(world.loads) == 0


async def test_an_instance_that_dies_while_it_loads_is_followed_by_another(world) -> None:
    from mesh.wire.client import RpcError

    for instance_id in ("a", "b"):
        world.instance(instance_id)
    world.instance("b", capacity_bytes=500_000_000)  # so that "a" is the first choice
    world.model("m")
    world.hold()
    world.script("a", RpcError(Code.UNAVAILABLE, "connection lost"))
    call = world.call("m")
    await world.until(lambda: world.asked == ["a"])
    world.view.delete_instance("a")
    world.release()
    await world.until(lambda: call.settled)
    assert call.forwards == ["b:1"]


async def test_instances_that_seem_not_to_answer_are_asked_last(world) -> None:
    for instance_id in ("a", "b"):
        world.instance(instance_id)
        world.model(f"m-{instance_id}")
    for avoided, other in (("a", "b:1"), ("b", "a:1")):
        world.loads = world.dispatcher._loads = Loads(
            world.view,
            world.peers,
            world.metrics,
            policy=world.policy,
            now_ms=lambda: world.now_ms,
            avoid=lambda avoided=avoided: {avoided},
        )
        call = world.call(f"m-{avoided}")
        await world.until(lambda call=call: call.settled)
        assert call.forwards == [other]
        await world.loads.close()


# ---- what an instance is told ------------------------------------------------------------------


async def test_a_load_carries_the_record_its_priority_and_why(world) -> None:
    loads = Loads(
        world.view,
        world.peers,
        world.metrics,
        policy=world.policy,
        now_ms=lambda: world.now_ms,
        use_score=lambda model_id: 7.5,
    )
    world.instance("a")
    world.model("m", path="file:///m")
    await loads.ask(
        "m", "a", size_bytes=10, priority=LoadPriority.COPY, pin=True, reason="second_copy"
    )
    ((_, request),) = world.instances.asked
    assert decode_model("m", request.model_record) == world.view.models["m"]
    assert request.priority == internal.LoadRequest.COPY
    assert (request.pin, request.use_score, request.reason) == (True, 7.5, "second_copy")


async def test_what_was_decided_is_noted_in_the_words_of_the_core(world) -> None:
    decisions = DecisionLog(now_ms=lambda: world.now_ms)
    loads = Loads(
        world.view,
        world.peers,
        world.metrics,
        policy=PATIENT,
        now_ms=lambda: world.now_ms,
        decisions=decisions,
    )
    world.model("m")
    load = asyncio.ensure_future(loads.load("m"))
    await world.until(lambda: paused(loads))
    world.instance("a", state=InstanceState.STARTING)
    loads.view_changed()
    await world.until(lambda: len(decisions.decisions) == 2)
    world.instance("a")
    loads.view_changed()
    assert await load == "a"
    noted = [(d.kind, d.reason, d.instance_id) for d in decisions.decisions.recent(9)]
    assert noted == [
        ("place", "only_candidate", "a"),
        ("wait", "instances_starting", ""),
        ("wait", "no_instances", ""),
    ]
    world.view.delete_model("m")
    world.model("m", model_type="abacus")
    world.view.delete_copy("m", "a")
    with pytest.raises(MeshError):
        await loads.load("m")
    assert decisions.decisions.recent(1)[0].reason == "no_runtime"


async def test_requests_for_a_broken_model_do_not_flood_what_is_noted(world) -> None:
    decisions = DecisionLog(now_ms=lambda: world.now_ms)
    loads = Loads(
        world.view,
        world.peers,
        world.metrics,
        policy=PATIENT,
        now_ms=lambda: world.now_ms,
        decisions=decisions,
    )
    world.instance("a")
    world.model("m", model_type="abacus")

    def refused(count: int) -> int:
        for _ in range(count):
            with pytest.raises(MeshError, match="abacus"):
                loads.begin("m")
        return len(decisions.decisions)

    assert refused(100) == 1
    world.now_ms += 1_000
    assert refused(100) == 2
