"""The hot table and what happens when an attempt fails: each row of the relay's failures."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mesh.core import routing
from mesh.core.errors import Code
from mesh.core.policy import Policy
from mesh.core.types import InstanceState
from mesh.wire.hpack import encode_literal
from mesh.wire.relay import Failure
from router.routes import CopyRoute, pick

# ---- hits ------------------------------------------------------------------------------------


def test_a_call_goes_to_the_only_copy_under_its_concrete_id(world) -> None:
    world.instance("a")
    world.model("iris__isvc-1")
    world.alias("iris", "iris__isvc-1")
    world.copy("iris__isvc-1", "a")
    call = world.call("iris")
    assert call.forwards == ["a:1"]
    assert call.fields == [encode_literal(b"mm-model-id", b"iris__isvc-1")]
    assert world.dispatcher.inflight_on("iris__isvc-1", "a") == 1
    call.finish()
    assert world.dispatcher.inflight_on("iris__isvc-1", "a") == 0
    assert world.dispatcher.inflight == 0


def test_of_several_copies_the_one_with_fewest_in_flight_answers(world) -> None:
    for instance_id in ("a", "b", "c"):
        world.instance(instance_id)
        world.copy("m", instance_id)
    world.model("m")
    calls = [world.call("m") for _ in range(9)]
    assert sorted(c.forwards[0] for c in calls) == sorted(["a:1", "b:1", "c:1"] * 3)
    on_b = next(c for c in calls if c.forwards == ["b:1"])
    on_b.finish()
    assert world.call("m").forwards == ["b:1"]


def test_names_of_one_model_share_its_in_flight_counts(world) -> None:
    for instance_id in ("a", "b"):
        world.instance(instance_id)
        world.copy("m", instance_id)
    world.model("m")
    world.alias("name", "m")
    assert {world.call("m").forwards[0], world.call("name").forwards[0]} == {"a:1", "b:1"}


@given(
    loads=st.lists(st.integers(0, 3), min_size=1, max_size=7),
    draw=st.floats(0, 1, exclude_max=True),
)
def test_the_quick_choice_is_the_core_s(loads: list[int], draw: float) -> None:
    copies = [CopyRoute("m", f"i{at}", None) for at in range(len(loads))]  # type: ignore[arg-type]
    for copy, inflight in zip(copies, loads, strict=True):
        copy.inflight = inflight
    counts = {copy.instance_id: copy.inflight for copy in copies}
    expected = routing.route(tuple(counts), counts, draw=draw)
    assert expected is not None
    assert pick(copies, draw).instance_id == expected.instance_id


# ---- the table follows the view ----------------------------------------------------------------


def test_an_alias_that_moves_takes_its_requests_along(world) -> None:
    world.instance("a")
    for model_id in ("old", "new"):
        world.model(model_id)
        world.copy(model_id, "a")
    world.alias("iris", "old")
    assert world.call("iris").fields == [encode_literal(b"mm-model-id", b"old")]
    # Asked for by its id in between: the entry of the alias must not look checked by that.
    world.alias("iris", "new")
    assert world.call("old").fields == [encode_literal(b"mm-model-id", b"old")]
    assert world.call("iris").fields == [encode_literal(b"mm-model-id", b"new")]


def test_only_what_changed_is_rebuilt(world) -> None:
    world.instance("a")
    for model_id in ("m1", "m2"):
        world.model(model_id)
        world.copy(model_id, "a")
        world.call(model_id)
    before = world.dispatcher._entries["m1"].copies
    world.view.delete_copy("m2", "a")
    world.call("m1")
    assert world.dispatcher._entries["m1"].copies is before


def test_a_draining_instance_gets_nothing_new(world) -> None:
    for instance_id in ("a", "b"):
        world.instance(instance_id)
        world.copy("m", instance_id)
    world.model("m")
    world.call("m")
    world.instance("a", state=InstanceState.DRAINING)
    assert {world.call("m").forwards[0] for _ in range(4)} == {"b:1"}


async def test_an_instance_that_comes_back_gets_a_new_connection(world) -> None:
    world.instance("a")
    world.model("m")
    world.copy("m", "a")
    first = world.call("m").upstream
    world.view.delete_instance("a")
    await world.peers.prune()
    world.instance("a")
    second = world.call("m").upstream
    assert first.closed
    assert second is not first


def test_prune_forgets_names_and_copies_that_are_gone(world) -> None:
    world.instance("a")
    for model_id in ("m1", "m2"):
        world.model(model_id)
        world.copy(model_id, "a")
        world.call(model_id).finish()
    world.view.delete_copy("m1", "a")
    world.view.delete_model("m1")
    world.dispatcher.prune()
    assert world.dispatcher.table_size() == (1, 1)
    assert world.call("m2").forwards == ["a:1"]


def test_when_a_model_was_last_used_is_known_after_its_copy_has_gone(world) -> None:
    world.instance("a")
    world.model("m")
    world.copy("m", "a")
    assert world.dispatcher.last_used_s("m") == 0.0
    world.call("m").finish()
    used_s = world.dispatcher.last_used_s("m")
    assert used_s > 0
    world.view.delete_copy("m", "a")
    assert world.dispatcher.last_used_s("m") == used_s
    world.dispatcher.prune()
    assert world.dispatcher.last_used_s("m") == used_s
    assert world.dispatcher.table_size() == (1, 0)
    world.copy("m", "a")  # a new copy, not used yet
    call = world.call("m")
    assert world.dispatcher.last_used_s("m") == used_s
    assert world.dispatcher.inflight_on("m", "a") == 1
    assert world.dispatcher.table_size() == (1, 1)
    # Only a model that is gone is forgotten.
    call.finish()
    world.view.delete_copy("m", "a")
    world.view.delete_model("m")
    world.dispatcher.prune()
    assert world.dispatcher.last_used_s("m") == 0.0
    assert world.dispatcher.table_size() == (0, 0)


# ---- failed attempts ---------------------------------------------------------------------------


def two_copies(world) -> None:
    for instance_id in ("a", "b"):
        world.instance(instance_id)
        world.copy("m", instance_id)
    world.model("m")


@pytest.mark.parametrize("failure", list(Failure))
async def test_another_copy_is_tried(world, failure: Failure) -> None:
    two_copies(world)
    call = world.call("m")
    world.dispatcher.failed(call, call.upstream, failure)
    assert call.forwards == ["a:1", "b:1"]
    assert world.dispatcher.inflight_on("m", "a") == 0
    assert world.dispatcher.inflight_on("m", "b") == 1
    assert world.metrics.value("retries", failure.value) == 1


def test_a_copy_that_is_not_there_is_forgotten_until_the_store_tells_of_it_again(world) -> None:
    two_copies(world)
    call = world.call("m")
    world.dispatcher.failed(call, call.upstream, Failure.NOT_HERE)
    assert {world.call("m").forwards[0] for _ in range(3)} == {"b:1"}
    world.copy("m", "a")
    assert world.call("m").forwards == ["a:1"]


async def test_a_model_that_is_nowhere_any_more_is_loaded_again_even_on_the_same_instance(
    world,
) -> None:
    world.instance("a")
    world.model("m")
    world.copy("m", "a")
    call = world.call("m")
    world.dispatcher.failed(call, call.upstream, Failure.NOT_HERE)
    await world.until(lambda: len(call.forwards) == 2)
    assert world.asked == ["a"]
    assert call.forwards == ["a:1", "a:1"]


@pytest.mark.parametrize("failure", [Failure.CONNECT, Failure.LOST, Failure.DRAINING])
async def test_without_another_copy_the_model_is_loaded_elsewhere(world, failure) -> None:
    world.instance("a")
    world.instance("b")
    world.model("m")
    world.copy("m", "a")
    call = world.call("m")
    world.dispatcher.failed(call, call.upstream, failure)
    await world.until(lambda: len(call.forwards) == 2)
    assert world.asked == ["b"]
    assert call.forwards == ["a:1", "b:1"]


async def test_an_instance_that_cannot_be_reached_is_passed_over_for_a_moment(world) -> None:
    two_copies(world)
    world.build(Policy(outlier_eject_ms=1))
    call = world.call("m")
    world.peers.upstream("a").listens = False
    world.dispatcher.failed(call, call.upstream, Failure.CONNECT)
    # With nothing in flight there it would otherwise be the choice of every other call.
    assert {world.call("m").forwards[0] for _ in range(5)} == {"b:1"}
    assert world.peers.avoided() == {"a"}
    world.peers.upstream("a").listens = True
    await world.until(lambda: not world.peers.avoided())
    assert world.call("m").forwards == ["a:1"]


def test_two_overloaded_copies_are_resource_exhausted_with_a_hint(world) -> None:
    two_copies(world)
    world.instance("c")
    world.copy("m", "c")
    call = world.call("m")
    world.dispatcher.failed(call, call.upstream, Failure.OVERLOADED)
    world.dispatcher.failed(call, call.upstream, Failure.OVERLOADED)
    assert len(call.forwards) == 2
    assert call.error is not None
    assert call.error.code is Code.RESOURCE_EXHAUSTED
    assert call.error.retry_after_ms


def test_one_overloaded_copy_does_not_cause_a_load(world) -> None:
    world.instance("a")
    world.instance("b")
    world.model("m")
    world.copy("m", "a")
    call = world.call("m")
    world.dispatcher.failed(call, call.upstream, Failure.OVERLOADED)
    assert call.error is not None
    assert call.error.code is Code.RESOURCE_EXHAUSTED
    assert world.asked == []


def test_attempts_are_bounded(world) -> None:
    world.build(Policy(hops_max=3))
    for instance_id in "abcdef":
        world.instance(instance_id)
        world.copy("m", instance_id)
    world.model("m")
    call = world.call("m")
    while call.error is None:
        world.dispatcher.failed(call, call.upstream, Failure.LOST)
    assert len(call.forwards) == 3
    assert call.error.code is Code.UNAVAILABLE
    assert "m" in call.error.message
    assert all(world.dispatcher.inflight_on("m", i) == 0 for i in "abcdef")


async def test_a_copy_that_is_gone_again_after_each_load_is_given_up(world) -> None:
    """In the time that a request without a deadline may wait, and not as fast as it can."""
    world.build(Policy(hops_max=4, load_timeout_ms=100, queue_timeout_ms=1))
    world.instance("a")
    world.model("m")
    call = world.call("m")
    call.on_forward = lambda c: world.dispatcher.failed(c, c.upstream, Failure.NOT_HERE)
    await world.until(lambda: call.error is not None)
    assert call.error.code is Code.UNAVAILABLE and call.error.retry_after_ms
    assert 4 <= len(world.asked) <= 8
    assert world.dispatcher.inflight == 0


async def test_a_copy_that_is_gone_again_more_often_than_hops_max_answers_in_the_end(world) -> None:
    """Memory is short and others are quicker: that is no failure of the request."""
    world.build(Policy(hops_max=2, placement_retry_ms=1, placement_retry_max_ms=1))
    world.instance("a")
    world.model("m")
    call = world.call("m")
    gone = [Failure.NOT_HERE] * 8
    call.on_forward = lambda c: gone and world.dispatcher.failed(c, c.upstream, gone.pop())
    await world.until(lambda: call.error is not None or not gone)
    await world.until(lambda: world.dispatcher.inflight_on("m", "a") == 1)
    assert call.error is None and len(world.asked) == 9


# ---- metrics -----------------------------------------------------------------------------------


async def test_hits_misses_and_requests_are_counted(world) -> None:
    world.instance("a")
    world.model("m")
    call = world.call("m")
    await world.until(lambda: call.forwards)
    call.finish()
    world.call("m").finish()
    world.dispatcher.publish_counters()
    assert world.metrics.value("misses") == 1
    assert world.metrics.value("hits") == 1
    assert world.metrics.value("api_request", "ModelInfer", "OK") == 2
    assert world.metrics.value("cache_miss") == 1
