"""Misses: one load whoever waits, outcomes, bounds, and waiters that leave."""

from __future__ import annotations

import asyncio

import pytest

from mesh.core.errors import Code, MeshError, ResourceExhausted
from mesh.core.policy import Policy
from mesh.core.types import CopyState
from mesh.wire.client import RpcError
from protos import mesh_internal_pb2 as internal

# What waits for a place is in test_loads_wait.py.
IMPATIENT = Policy(placement_wait_ms=0)


def failed(code: Code, message: str) -> internal.LoadResponse:
    return internal.LoadResponse(outcome="FAILED", code=int(code), message=message)


def claimed(by: str) -> internal.LoadResponse:
    return internal.LoadResponse(outcome="CLAIMED_ELSEWHERE", claimed_instance_id=by)


def rejected() -> internal.LoadResponse:
    return internal.LoadResponse(outcome="REJECTED", message="no room")


async def test_many_waiters_cause_one_load_and_are_released_in_order(world) -> None:
    world.instance("a")
    world.model("m")
    order: list[int] = []
    world.hold()
    calls = [world.call("m") for _ in range(50)]
    for at, call in enumerate(calls):
        call.on_forward = lambda _, at=at: order.append(at)
    await world.until(lambda: world.asked)
    assert world.loads.waiting == 50
    world.release()
    await world.until(lambda: all(c.forwards for c in calls))
    assert world.asked == ["a"]
    assert order == list(range(50))
    assert world.loads.waiting == 0
    assert world.loads.under_way == ()


async def test_a_loaded_copy_is_routable_before_the_watch_says_so(world) -> None:
    world.instance("a")
    world.model("m")
    first = world.call("m")
    await world.until(lambda: first.forwards)
    second = world.call("m")
    assert second.forwards == ["a:1"]
    assert world.asked == ["a"]


async def test_a_waiter_that_leaves_does_not_cancel_the_load(world) -> None:
    world.instance("a")
    world.model("m")
    world.hold()
    gone, stays = world.call("m"), world.call("m")
    await world.until(lambda: world.asked)
    gone.finish(int(Code.CANCELLED))
    assert world.loads.waiting == 1
    world.release()
    await world.until(lambda: stays.forwards)
    assert gone.forwards == []
    assert world.asked == ["a"]


async def test_a_load_that_nobody_waits_for_any_more_still_ends_in_a_copy(world) -> None:
    world.instance("a")
    world.model("m")
    world.hold()
    call = world.call("m")
    await world.until(lambda: world.asked)
    call.finish(int(Code.DEADLINE_EXCEEDED))
    world.release()
    await world.until(lambda: world.view.loaded_on("m"))
    assert world.view.loaded_on("m") == ("a",)


async def test_a_waiter_may_leave_while_others_are_being_released(world) -> None:
    world.instance("a")
    world.model("m")
    world.hold()
    first, second = world.call("m"), world.call("m")
    first.on_forward = lambda _: second.finish(int(Code.CANCELLED))
    await world.until(lambda: world.asked)
    world.release()
    await world.until(lambda: first.forwards and not world.loads.waiting)
    assert second.forwards == []
    assert second.error is None


async def test_pending_placements_are_counted_so_that_loads_spread(world) -> None:
    for instance_id in ("a", "b"):
        world.instance(instance_id, capacity_bytes=1_000)
    for at in range(4):
        world.model(f"m{at}", size_bytes_stated=100)
    world.hold()
    for at in range(4):
        world.call(f"m{at}")
    await world.until(lambda: len(world.asked) == 4)
    assert sorted(world.asked) == ["a", "a", "b", "b"]
    world.release()
    await world.until(lambda: not world.loads.under_way)
    assert all(not slot.pending for slot in world.view.instances.values())


async def test_the_load_carries_the_revision_that_the_decision_saw(world) -> None:
    world.instance("a")
    world.model("m")
    world.view.advance(77)
    call = world.call("m")
    await world.until(lambda: call.forwards)
    _, request = world.instances.asked[0]
    assert request.model_id == "m"
    assert request.revision == 77
    assert request.last_used_at_ms == world.now_ms


# ---- outcomes ----------------------------------------------------------------------------------


async def test_claimed_elsewhere_joins_the_load_of_the_holder(world) -> None:
    world.instance("a")
    world.instance("b", capacity_bytes=500_000_000)  # so that "a" is the first choice
    world.model("m")
    world.script("a", claimed("b"))
    call = world.call("m")
    await world.until(lambda: call.settled)
    assert world.asked == ["a", "b"]
    assert call.forwards == ["b:1"]


async def test_a_copy_that_the_view_shows_loading_is_joined(world) -> None:
    for instance_id in ("a", "b", "c"):
        world.instance(instance_id)
    world.model("m")
    world.copy("m", "c", CopyState.LOADING)
    call = world.call("m")
    await world.until(lambda: call.settled)
    assert world.asked == ["c"]
    assert call.forwards == ["c:1"]


@pytest.mark.parametrize("answer", [rejected(), RpcError(Code.UNAVAILABLE, "connection refused")])
async def test_an_instance_that_does_not_try_is_passed_over(world, answer) -> None:
    world.build(IMPATIENT)
    for instance_id in ("a", "b"):
        world.instance(instance_id)
    world.model("m")
    world.script("a", answer)
    world.script("b", answer)
    call = world.call("m")
    await world.until(lambda: call.settled)
    assert sorted(world.asked) == ["a", "b"]
    assert call.error is not None
    assert call.error.code is Code.UNAVAILABLE
    assert call.error.retry_after_ms


async def test_after_a_failure_the_next_instance_is_tried(world) -> None:
    world.instance("a")
    world.instance("b", capacity_bytes=500_000_000)
    world.model("m")
    world.script("a", failed(Code.FAILED_PRECONDITION, "corrupt"))
    call = world.call("m")
    await world.until(lambda: call.settled)
    assert world.asked == ["a", "b"]
    assert call.forwards == ["b:1"]


@pytest.mark.parametrize("code", [Code.FAILED_PRECONDITION, Code.UNAVAILABLE])
async def test_a_failure_everywhere_is_told_with_its_cause_and_kind(world, code: Code) -> None:
    for instance_id in ("a", "b"):
        world.instance(instance_id)
        world.script(instance_id, failed(code, "the bucket is on fire"))
    world.model("m")
    calls = [world.call("m") for _ in range(3)]
    await world.until(lambda: all(c.settled for c in calls))
    for call in calls:
        assert call.error is not None
        assert call.error.code is code
        assert "the bucket is on fire" in call.error.message
    assert sorted(world.asked) == ["a", "b"]


async def test_a_model_deleted_during_its_load_loads_when_it_is_registered_anew(world) -> None:
    world.instance("a")
    world.model("m")
    world.script("a", failed(Code.NOT_FOUND, "it was deleted while it was being loaded"))
    world.hold()
    first = world.call("m")
    await world.until(lambda: world.asked)
    world.view.delete_model("m")
    world.release()
    await world.until(lambda: first.settled)
    assert first.error is not None
    assert first.error.code is Code.NOT_FOUND
    world.model("m")
    again = world.call("m")
    await world.until(lambda: again.settled)
    assert again.forwards == ["a:1"]


async def test_a_recorded_failure_answers_at_once_until_it_expires(world) -> None:
    world.instance("a")
    world.model("m")
    world.script("a", failed(Code.FAILED_PRECONDITION, "corrupt"))
    first = world.call("m")
    await world.until(lambda: first.settled)
    again = world.call("m")
    assert again.error is not None, "answered at once, without a load"
    assert again.error.code is Code.FAILED_PRECONDITION
    assert "corrupt" in again.error.message
    assert world.asked == ["a"]
    world.now_ms += world.policy.load_failure_expiry_ms + 1
    third = world.call("m")
    await world.until(lambda: third.settled)
    assert third.forwards == ["a:1"]
    assert world.asked == ["a", "a"]


async def test_at_most_so_many_instances_try_a_failing_model(world) -> None:
    for at in range(8):
        world.instance(f"i{at}")
        world.script(f"i{at}", failed(Code.FAILED_PRECONDITION, "corrupt"))
    world.model("m")
    call = world.call("m")
    await world.until(lambda: call.settled)
    assert len(world.asked) == world.policy.max_load_failures


def test_a_model_larger_than_any_instance_is_final_and_asks_nobody(world) -> None:
    world.instance("a", capacity_bytes=1_000)
    world.model("m", size_bytes_stated=5_000)
    call = world.call("m")
    assert call.error is not None
    assert call.error.code is Code.FAILED_PRECONDITION
    assert "5000 bytes" in call.error.message
    assert world.asked == []


async def test_a_model_deleted_while_it_loads_is_not_found(world) -> None:
    world.instance("a")
    world.model("m")
    world.script("a", rejected())
    world.hold()
    call = world.call("m")
    await world.until(lambda: world.asked)
    world.view.delete_model("m")
    world.release()
    await world.until(lambda: call.settled)
    assert call.error is not None
    assert call.error.code is Code.NOT_FOUND


async def test_an_answer_that_cannot_be_read_does_not_hang_the_waiters(world) -> None:
    world.build(IMPATIENT)
    world.instance("a")
    world.model("m")
    world.script("a", internal.LoadResponse())
    call = world.call("m")
    await world.until(lambda: call.settled)
    assert call.error is not None
    assert call.error.code is Code.UNAVAILABLE


# ---- bounds ------------------------------------------------------------------------------------


async def test_waiters_of_one_model_are_bounded(world) -> None:
    world.build(Policy(max_waiting_per_model=2))
    world.instance("a")
    world.model("m")
    world.model("other")
    world.hold()
    calls = [world.call("m") for _ in range(3)]
    assert [c.settled for c in calls] == [False, False, True]
    error = calls[2].error
    assert isinstance(error, ResourceExhausted)
    assert error.retry_after_ms
    assert "'m'" in error.message
    assert not world.call("other").settled


async def test_waiters_altogether_are_bounded(world) -> None:
    world.build(Policy(max_waiting_total=2))
    world.instance("a")
    for at in range(3):
        world.model(f"m{at}")
    world.hold()
    calls = [world.call(f"m{at}") for at in range(3)]
    assert [c.settled for c in calls] == [False, False, True]
    assert calls[2].error.code is Code.RESOURCE_EXHAUSTED
    calls[0].finish(int(Code.CANCELLED))
    assert not world.call("m1").settled, "a place came free"


async def test_without_a_deadline_the_wait_is_bounded(world) -> None:
    world.build(Policy(load_timeout_ms=20, queue_timeout_ms=10))
    world.instance("a")
    world.model("m")
    world.hold()
    bounded = world.call("m")
    by_its_carrier = world.call("m", deadline_s=1e9)
    await world.until(lambda: bounded.error is not None)
    assert bounded.error.code is Code.UNAVAILABLE
    assert by_its_carrier.error is None
    assert world.loads.waiting == 1


async def test_shutting_down_fails_those_who_wait(world) -> None:
    world.instance("a")
    world.model("m")
    world.hold()
    call = world.call("m")
    await world.until(lambda: world.asked)
    await world.loads.close()
    assert call.error is not None
    assert call.error.code is Code.UNAVAILABLE


# ---- two routers -------------------------------------------------------------------------------


async def test_two_routers_that_pick_different_instances_end_at_one_copy(world) -> None:
    """The claim is the instance's; what the routers do is join the one that has it."""
    other = type(world)()
    for router in (world, other):
        router.model("m")
    world.instance("a")
    world.instance("b")
    other.instance("a")
    other.instance("b")
    picked = None
    first = world.call("m")
    await world.until(lambda: first.settled)
    picked = world.asked[0]
    loser = "b" if picked == "a" else "a"
    # The other router's view made it choose otherwise: the loser's claim fails.
    other.instance(picked, capacity_bytes=500_000_000)
    other.script(loser, claimed(picked))
    second = other.call("m")
    await other.until(lambda: second.settled)
    assert other.asked == [loser, picked]
    assert second.forwards == first.forwards
    await other.loads.close()


# ---- for those who are no calls ----------------------------------------------------------------


async def test_load_returns_the_instance(world) -> None:
    world.instance("a")
    world.model("m")
    assert await world.loads.load("m") == "a"
    assert await world.loads.load("m") == "a"
    assert world.asked == ["a"]


async def test_load_raises_the_cause(world) -> None:
    world.instance("a")
    world.model("m")
    world.script("a", failed(Code.FAILED_PRECONDITION, "corrupt"))
    with pytest.raises(MeshError, match="corrupt"):
        await world.loads.load("m")


async def test_cancelling_load_cancels_no_load(world) -> None:
    world.instance("a")
    world.model("m")
    world.hold()
    task = asyncio.get_running_loop().create_task(world.loads.load("m"))
    await world.until(lambda: world.asked)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.loads.waiting == 0
    world.release()
    await world.until(lambda: world.view.loaded_on("m"))
