"""Names that the view does not know: the store has the last word, within bounds."""

from __future__ import annotations

import asyncio

from mesh import registry
from mesh.core.errors import Code
from mesh.core.types import ModelRecord, VModelRecord
from router.names import MAX_READS, NEGATIVE_TTL_S


async def test_an_unknown_model_is_not_found_and_named(world) -> None:
    call = world.call("nobody")
    await world.until(lambda: call.settled)
    assert call.error.code is Code.NOT_FOUND
    assert "'nobody'" in call.error.message


def test_no_name_at_all_says_what_to_do(world) -> None:
    call = world.call("")
    assert call.error.code is Code.INVALID_ARGUMENT
    assert "mm-model-id" in call.error.message


async def test_a_model_that_the_watch_has_not_shown_yet_is_found(world) -> None:
    world.instance("a")
    await world.store.put(registry.model_key("m"), registry.encode(ModelRecord("m", "onnx")))
    call = world.call("m")
    await world.until(lambda: call.settled)
    assert call.forwards == ["a:1"]


async def test_an_alias_that_the_watch_has_not_shown_yet_is_found(world) -> None:
    world.instance("a")
    await world.store.put(registry.model_key("m"), registry.encode(ModelRecord("m", "onnx")))
    alias = VModelRecord("name", "m", "m")
    await world.store.put(registry.vmodel_key("name"), registry.encode(alias))
    call = world.call("name")
    await world.until(lambda: call.settled)
    assert call.forwards == ["a:1"]


async def test_a_name_that_was_not_there_is_not_read_again_for_a_while(world) -> None:
    for _ in range(5):
        call = world.call("nobody")
        await world.until(lambda: call.settled)  # noqa: B023
    assert world.names.reads == 1
    world.clock_s += NEGATIVE_TTL_S + 0.1
    call = world.call("nobody")
    await world.until(lambda: call.settled)
    assert world.names.reads == 2


async def test_one_name_is_read_once_for_all_who_ask(world) -> None:
    calls = [world.call("nobody") for _ in range(20)]
    await world.until(lambda: all(c.settled for c in calls))
    assert world.names.reads == 1


async def test_a_flood_of_names_is_not_a_flood_of_reads(world) -> None:
    calls = [world.call(f"nobody-{at}") for at in range(500)]
    await world.until(lambda: all(c.settled for c in calls))
    assert world.names.reads <= MAX_READS
    assert {c.error.code for c in calls} == {Code.NOT_FOUND}


async def test_while_the_store_is_away_an_unknown_name_is_retryable(world) -> None:
    world.store.partition()
    call = world.call("m")
    await world.until(lambda: call.settled)
    assert call.error.code is Code.UNAVAILABLE
    assert call.error.retry_after_ms


async def test_the_client_may_leave_during_the_read(world) -> None:
    world.instance("a")
    await world.store.put(registry.model_key("m"), registry.encode(ModelRecord("m", "onnx")))
    call = world.call("m")
    call.finish(int(Code.CANCELLED))
    other = world.call("m")
    await world.until(lambda: other.settled)
    await asyncio.sleep(0)
    assert call.forwards == []
    assert call.error is None


async def test_a_name_that_no_key_can_have_is_not_found(world) -> None:
    call = world.call("x" * 2_000)
    await world.until(lambda: call.settled)
    assert call.error.code is Code.NOT_FOUND
    assert len(call.error.message) < 500
