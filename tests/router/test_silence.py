"""Calls whose instance does not answer: elsewhere, or waiting until something comes."""

from __future__ import annotations

import pytest

from mesh.core.errors import Code
from mesh.core.policy import Policy
from mesh.core.usage import score_after
from mesh.wire.client import RpcError
from mesh.wire.relay import Failure

QUICK = Policy(
    outlier_failures=3,
    outlier_eject_ms=1,
    placement_retry_ms=1,
    placement_retry_max_ms=1,
    hops_max=4,
)


def one_copy(world, *others: str, policy: Policy = QUICK) -> None:
    """``m`` on ``a``; the others are empty."""
    world.build(policy)
    for instance_id in ("a", *others):
        world.instance(instance_id)
    world.model("m")
    world.copy("m", "a")


def two_copies(world, policy: Policy = QUICK) -> None:
    one_copy(world, "b", policy=policy)
    world.copy("m", "b")


def fail(world, call, failure: Failure) -> None:
    world.dispatcher.failed(call, call.upstream, failure)


def decisions(world) -> list[tuple[str, str, str]]:
    noted = world.decisions.decisions.recent(100)
    return [(d.kind, d.reason, d.instance_id) for d in reversed(noted)]


def held(world) -> int:
    """Calls that wait: for a load or a place, or for an instance that is to come back."""
    return world.dispatcher.waiting + world.loads.waiting


# ---- who is avoided ------------------------------------------------------------------------------


def test_a_silent_instance_gets_nothing_new_and_its_return_is_noted(world) -> None:
    two_copies(world)
    world.call("m")
    world.silent("a")
    assert world.peers.avoided() == {"a"}
    assert {world.call("m").forwards[0] for _ in range(5)} == {"b:1"}
    assert world.peers.upstream("a").relieved, "its calls are let go"
    world.speaks("a")
    assert not world.peers.avoided()
    assert "a:1" in {world.call("m").forwards[0] for _ in range(8)}
    assert decisions(world) == [("eject", "silent", "a"), ("readmit", "answered", "a")]


def test_one_way_that_is_silent_blames_no_instance_that_speaks_on_the_other(world) -> None:
    two_copies(world)
    channel = world.peers.channel("a")
    channel.peer.heard_s = 3.0
    world.silent("a")
    assert not world.peers.avoided()


def test_calls_leave_a_silent_instance_only_when_all_silent_ones_are_known(world) -> None:
    """Or a call would go from one stopped instance to the next."""
    two_copies(world)
    seen: list[frozenset[str]] = []
    for instance_id in ("a", "b"):
        upstream = world.peers.upstream(instance_id)
        upstream.silent_since_s = 2.0
        upstream.relieve = lambda now_s, patience: seen.append(world.peers.avoided())
    world.watch()
    assert seen == [{"a", "b"}] * 2


def test_an_instance_that_has_left_is_forgotten(world) -> None:
    two_copies(world)
    world.silent("a")
    world.peers.upstream("a").silent_since_s = 0.0
    world.view.delete_instance("a")
    world.peers._forgot_s = 0.0
    world.watch()
    assert not world.peers.avoided()


async def test_failures_in_a_row_pass_over_and_the_answer_of_one_probe_takes_back(world) -> None:
    two_copies(world)
    for _ in range(3):
        call = world.call("m")
        while call.forwards[-1] != "a:1":
            call.finish()
            call = world.call("m")
        fail(world, call, Failure.LOST)
        call.finish()
    assert world.peers.avoided() == {"a"}
    await world.until(lambda: not world.peers.avoided())  # its time is over
    probe, other = world.call("m"), world.call("m")
    assert (probe.forwards, other.forwards) == (["a:1"], ["b:1"])
    probe.finish()
    assert world.call("m").forwards == ["a:1"]
    assert decisions(world) == [
        ("eject", "failures_in_a_row", "a"),
        ("readmit", "answered", "a"),
    ]


async def test_a_probe_that_fails_is_answered_elsewhere(world) -> None:
    two_copies(world)
    for _ in range(3):
        world.peers.attempt_failed("a")
    await world.until(lambda: not world.peers.avoided())
    probe = world.call("m")
    fail(world, probe, Failure.LOST)
    assert probe.forwards == ["a:1", "b:1"]
    assert decisions(world)[-1] == ("eject", "probe_failed", "a")


def test_a_suspect_is_used_where_no_other_copy_is(world) -> None:
    one_copy(world, "b", "c")
    for _ in range(3):
        world.peers.attempt_failed("a")
    assert world.peers.avoided() == {"a"}
    assert world.call("m").forwards == ["a:1"]
    assert world.asked == []


def test_deadlines_that_pass_on_an_instance_are_failures_when_they_were_not_short(world) -> None:
    two_copies(world)
    world.view.delete_copy("m", "b")
    for took_s in (0.1, 0.1, 0.1, 5.0, 5.0):
        call = world.call("m")
        world.dispatcher.done(call, int(Code.DEADLINE_EXCEEDED), call.started_s + took_s)
    assert not world.peers.avoided()
    call = world.call("m")
    world.dispatcher.done(call, int(Code.DEADLINE_EXCEEDED), call.started_s + 5.0)
    assert world.peers.avoided() == {"a"}


def test_an_answer_of_the_model_whatever_it_says_ends_the_row(world) -> None:
    one_copy(world, "b")
    for code in (Code.OK, Code.INVALID_ARGUMENT, Code.INTERNAL):
        for _ in range(2):
            world.peers.attempt_failed("a")
        world.call("m").finish(int(code))
    assert not world.peers.avoided()


# ---- calls that are under way --------------------------------------------------------------------


async def test_a_call_of_the_only_copy_is_answered_elsewhere(world) -> None:
    one_copy(world, "b")
    call = world.call("m")
    world.silent("a")
    fail(world, call, Failure.SILENT)
    await world.until(lambda: len(call.forwards) == 2)
    assert call.forwards == ["a:1", "b:1"] and world.asked == ["b"]


async def test_new_calls_of_the_only_copy_do_not_wait_for_a_silent_instance(world) -> None:
    one_copy(world, "b")
    world.silent("a")
    call = world.call("m")
    assert call.forwards == []
    await world.until(lambda: call.forwards)
    assert call.forwards == ["b:1"] and world.asked == ["b"]


async def test_the_only_instance_stands_still_and_its_calls_wait_until_it_goes_on(world) -> None:
    one_copy(world)
    under_way = world.call("m")
    world.silent("a")
    fail(world, under_way, Failure.SILENT)
    fresh = world.call("m", deadline_s=1e9)
    await world.until(lambda: held(world) == 2)
    world.speaks("a")
    await world.until(lambda: len(under_way.forwards) == 2 and fresh.forwards)
    assert under_way.error is None and fresh.forwards == ["a:1"]
    assert world.dispatcher.waiting == 0 and world.loads.waiting == 0


async def test_who_waits_for_a_load_goes_on_when_the_instance_is_back_before(world) -> None:
    one_copy(world, "b")
    world.hold()
    world.silent("a")
    call = world.call("m")
    await world.until(lambda: world.asked == ["b"])
    world.speaks("a")
    assert call.forwards == ["a:1"]
    assert world.loads.waiting == 0, "the load goes on without it"
    world.release()
    await world.until(lambda: not world.loads.under_way)
    assert call.forwards == ["a:1"]


async def test_a_load_that_fails_is_not_the_end_while_the_copy_may_come_back(world) -> None:
    one_copy(world, "b")
    world.script("b", *[RpcError(Code.UNAVAILABLE, "refused")] * 50)
    world.silent("a")
    call = world.call("m")
    await world.until(lambda: held(world))
    world.speaks("a")
    await world.until(lambda: call.forwards)
    assert call.error is None


async def test_when_the_copy_is_gone_from_the_view_the_call_goes_where_there_is_room(world) -> None:
    """Stopped beyond its lease."""
    one_copy(world)
    world.silent("a")
    call = world.call("m")
    await world.until(lambda: held(world) == 1)
    world.view.delete_instance("a")
    world.instance("b")
    world.loads.view_changed()
    await world.until(lambda: call.forwards)
    assert call.forwards == ["b:1"]


async def test_who_waits_in_vain_is_bounded_in_time_without_a_deadline(world) -> None:
    one_copy(world, policy=Policy(load_timeout_ms=20, queue_timeout_ms=1, placement_retry_ms=1))
    world.silent("a")
    call = world.call("m")
    await world.until(lambda: call.error is not None)
    assert call.error.code is Code.UNAVAILABLE and call.error.retry_after_ms


async def test_who_waits_is_bounded_in_number(world) -> None:
    one_copy(world, policy=Policy(max_waiting_total=2, placement_retry_ms=1))
    world.silent("a")
    calls = [world.call("m") for _ in range(6)]
    await world.until(lambda: world.dispatcher.inflight <= 4)
    refused = [call.error for call in calls if call.error is not None]
    assert {error.code for error in refused} == {Code.RESOURCE_EXHAUSTED}
    assert all(error.retry_after_ms for error in refused)
    world.speaks("a")
    await world.until(lambda: world.loads.waiting == 0 and world.dispatcher.waiting == 0)
    assert sum(call.forwards == ["a:1"] for call in calls) >= 2


async def test_a_client_that_goes_away_while_its_call_waits_leaves_nothing(world) -> None:
    one_copy(world)
    world.silent("a")
    call = world.call("m")
    await world.until(lambda: held(world))
    call.finish(int(Code.CANCELLED))
    world.speaks("a")
    assert call.forwards == []
    assert (world.dispatcher.waiting, world.loads.waiting, world.dispatcher.inflight) == (0, 0, 0)


# ---- nobody listens ------------------------------------------------------------------------------


async def test_a_failed_connection_is_tried_without_a_request_until_it_stands(world) -> None:
    one_copy(world)
    world.peers.upstream("a").listens = False
    call = world.call("m")
    fail(world, call, Failure.CONNECT)
    await world.until(lambda: decisions(world)[-1][1] == "probe_failed")
    assert call.error is None
    world.peers.upstream("a").listens = True
    await world.until(lambda: len(call.forwards) == 2)
    assert decisions(world)[-1] == ("readmit", "answered", "a")


def test_connections_that_fail_are_no_hops(world) -> None:
    world.build(Policy(hops_max=2))
    for instance_id in "abcdef":
        world.instance(instance_id)
        world.copy("m", instance_id)
    world.model("m")
    call = world.call("m")
    for _ in range(5):
        fail(world, call, Failure.CONNECT)
    assert call.error is None and len(set(call.forwards)) == 6


# ---- refusals ------------------------------------------------------------------------------------


def test_a_draining_copy_refuses_and_the_call_goes_on(world) -> None:
    two_copies(world)
    call = world.call("m")
    fail(world, call, Failure.DRAINING)
    assert call.forwards == ["a:1", "b:1"]
    assert not world.peers.avoided(), "to drain is no fault"


@pytest.mark.parametrize("failure", [Failure.REFUSED, Failure.NOT_HERE, Failure.OVERLOADED])
def test_who_refuses_often_is_not_passed_over_for_it(world, failure) -> None:
    """A refusal is an answer; an instance that leaves refuses many calls at once."""
    two_copies(world)
    for _ in range(5):
        for instance_id in ("a", "b"):
            world.copy("m", instance_id)
        fail(world, world.call("m"), failure)
    assert not world.peers.avoided()


# ---- the budget ----------------------------------------------------------------------------------


@pytest.mark.parametrize("failure", [Failure.LOST, Failure.SILENT, Failure.OVERLOADED])
def test_when_the_retry_budget_is_used_up_the_call_fails_with_a_hint(world, failure) -> None:
    two_copies(world, Policy(retry_budget_min=1, retry_budget_share=0.0))
    first, second = world.call("m"), world.call("m")
    fail(world, first, failure)
    assert len(first.forwards) == 2 and world.dispatcher.retries_left == 0
    fail(world, second, failure)
    assert second.error.code is Code.UNAVAILABLE and second.error.retry_after_ms
    assert len(second.forwards) == 1
    assert world.metrics.value("errors", "retry_budget") == 1
    assert world.metrics.value("retries_refused") == 1
    assert decisions(world)[-1][:2] == ("give_up", "retry_budget")


@pytest.mark.parametrize(
    "failure", [Failure.CONNECT, Failure.REFUSED, Failure.DRAINING, Failure.NOT_HERE]
)
def test_what_no_instance_has_worked_on_costs_no_budget(world, failure) -> None:
    two_copies(world, Policy(retry_budget_min=0, retry_budget_share=0.0))
    call = world.call("m")
    fail(world, call, failure)
    assert len(call.forwards) == 2 and call.error is None


def test_requests_earn_retries(world) -> None:
    two_copies(world, Policy(retry_budget_min=0, retry_budget_share=0.5))
    calls = [world.call("m") for _ in range(8)]
    for call in calls:
        fail(world, call, Failure.LOST)
    assert sum(call.error is None for call in calls) == 4


# ---- uses ----------------------------------------------------------------------------------------


def test_how_much_a_model_is_used_survives_its_copies(world) -> None:
    two_copies(world)
    assert world.dispatcher.use_score("m") == 0.0
    for _ in range(5):
        world.call("m").finish()
    half_life_ms = world.policy.use_half_life_ms
    expected = score_after(0.0, 5, world.now_ms, half_life_ms)
    assert world.dispatcher.use_score("m") == pytest.approx(expected)
    for _ in range(3):
        world.call("m").finish()
    world.view.delete_copy("m", "a")
    world.view.delete_copy("m", "b")
    world.dispatcher.prune()
    expected = score_after(expected, 3, world.now_ms, half_life_ms)
    assert world.dispatcher.use_score("m") == pytest.approx(expected)
    assert world.dispatcher.use_score("nobody") == 0.0


async def test_a_call_that_was_retried_is_one_use(world) -> None:
    two_copies(world)
    call = world.call("m")
    fail(world, call, Failure.LOST)
    call.finish()
    expected = score_after(0.0, 1, world.now_ms, world.policy.use_half_life_ms)
    assert world.dispatcher.use_score("m") == pytest.approx(expected)


# ---- what is remembered of instances -------------------------------------------------------------


def test_what_was_heard_before_the_silence_brings_no_instance_back(world) -> None:
    """Its silent connection has been closed, the other one says nothing new."""
    two_copies(world)
    world.call("m")
    world.peers.channel("a")
    world.silent("a")
    assert world.peers.avoided() == {"a"}
    upstream = world.peers.upstream("a")
    upstream.silent_since_s, upstream.heard_s, upstream.listens = 0.0, 0.0, False
    world.peers.channel("a").peer.heard_s = 0.5
    world.peers.watch(world.peers._clock() + 30)
    assert ("readmit", "answered", "a") not in decisions(world)


async def test_an_instance_with_few_failures_is_forgotten_when_it_has_left(world) -> None:
    two_copies(world)
    call = world.call("m")
    failed_on = call.forwards[0][0]
    fail(world, call, Failure.LOST)
    assert world.peers.outliers.standings
    world.view.delete_instance(failed_on)
    world.peers.watch(world.peers._clock() + 30)
    assert not world.peers.outliers.standings


@pytest.mark.parametrize("failure", [Failure.NOT_HERE, Failure.DRAINING])
async def test_a_refusal_ends_a_row_of_failures(world, failure) -> None:
    two_copies(world)
    first = world.call("m")
    instance_id = first.forwards[0][0]
    fail(world, first, Failure.LOST)
    world.view.delete_instance("b" if instance_id == "a" else "a")
    second = world.call("m")
    assert second.forwards[0][0] == instance_id
    fail(world, second, failure)
    assert not world.peers.outliers.standings
