"""Who does not read stalls itself: memory stays bounded, and the others go on."""

from __future__ import annotations

import asyncio

import pytest

from mesh.core.errors import Code
from mesh.wire import messages
from mesh.wire.client import RpcError, _Call
from mesh.wire.limits import INSIDE, PUBLIC
from mesh.wire.relay import RelayCall
from mesh.wire.transport import pump_of
from tests.wire.relay_world import INFER, STREAM, World, request
from tests.wire.waiting import WAIT_S, until


async def unread(world: World, count: int, size: int) -> list[_Call]:
    """Calls whose replies nobody takes: the client's windows are never refilled."""
    channel = world.channel()
    calls = []
    for _ in range(count):
        call = await channel.open(STREAM, (), 60.0)
        call.credit_step = 1 << 40  # this client gives no credit
        message = request("m", size)
        call.send_data(messages.prefix(message) + message, True)
        calls.append(call)
    return calls


def queued(world: World) -> list[RelayCall]:
    return [call for call in world.dispatch.routed if call.queue is not None]


async def test_slow_readers_of_large_replies(world: World) -> None:
    calls = await unread(world, 20, 4 << 20)
    await until(lambda: len(queued(world)) == 20)
    # Until the instance, too, is stopped: each stream's share of the window and no more.
    before = -1
    while before != (now := sum(c.queued_bytes for c in world.dispatch.routed)):
        before = now
        for _ in range(50):
            await asyncio.sleep(0)
    # All streams of a connection share what flowing ones may have beyond the first window.
    most = PUBLIC.max_wide_bytes_per_connection + 20 * INSIDE.stream_window_bytes
    assert sum(c.queued_bytes for c in world.dispatch.routed) <= most
    small = request("small", 400)
    other = world.channel()
    replies = [await other.unary(INFER, small, timeout_s=WAIT_S) for _ in range(50)]
    assert all(reply.message == small for reply in replies)
    assert {call.queue is not None for call in queued(world)} == {True}
    for call in calls:
        call.reset(8)


async def test_what_waits_long_does_not_keep_read_buffers(world: World) -> None:
    """A queued view would keep 256 KiB and more alive for the sake of a few bytes."""
    calls = await unread(world, 8, 2 << 20)
    await until(lambda: len(queued(world)) == 8)

    def views() -> int:
        return sum(
            isinstance(piece, memoryview) and isinstance(piece.obj, bytearray)
            for call in queued(world)
            for piece in call.queue or ()
        )

    await until(lambda: views() == 0, "queued views were copied")
    assert sum(call.queued_bytes for call in queued(world)) > 0
    for call in calls:
        call.reset(8)


async def test_the_rest_arrives_when_a_slow_reader_goes_on(world: World) -> None:
    (call,) = await unread(world, 1, 3 << 20)
    await until(lambda: queued(world))
    call.credit_step = 1
    call.consume(0)
    while call.ended is None:
        await call.wait()
    assert list(call.inbox) == [request("m", 3 << 20)] and call.error is None


async def test_an_instance_that_does_not_read_stalls_its_client(world: World) -> None:
    """What the client cannot get rid of is not piled up in between."""
    instance = world.instances[0]
    instance.reading.clear()
    stream = world.channel().stream(STREAM, timeout_s=60)
    message = request("m", 1 << 20)

    async def send() -> None:
        for _ in range(8):
            await stream.send(message)
        await stream.half_close()

    sending = asyncio.create_task(send())
    await until(lambda: instance.streams)
    (call,) = world.dispatch.routed
    small = request("small", 400)
    for _ in range(100):
        await world.channels[0].unary(INFER, small, timeout_s=WAIT_S)
    assert not sending.done()
    taken = PUBLIC.wide_window_bytes + INSIDE.stream_window_bytes
    assert call.request_bytes <= taken + INSIDE.accepted_window_bytes
    assert world.relay.budget.used_bytes <= world.relay.held_bytes_max
    instance.reading.set()
    got = [reply async for reply in stream]
    await sending
    assert got == [message] * 8


@pytest.mark.parametrize("count", [4])
async def test_small_calls_beside_large_ones_on_one_connection(world: World, count: int) -> None:
    channel = world.channel()
    large = request("large", 4 << 20)
    stop = False

    async def transfer() -> int:
        done = 0
        while not stop:
            assert (await channel.unary(INFER, large, timeout_s=30)).message == large
            done += 1
        return done

    transfers = [asyncio.create_task(transfer()) for _ in range(count)]
    small = request("small", 400)
    for _ in range(100):
        assert (await channel.unary(INFER, small, timeout_s=WAIT_S)).message == small
    stop = True
    assert all(await asyncio.gather(*transfers))


async def test_a_router_that_keeps_too_much_takes_no_more_calls(world: World) -> None:
    """What waits for slow readers counts against the bound of the process, and is given back."""
    pump_of(asyncio.get_running_loop()).on_tick = world.relay.note_queued
    budget = world.relay.budget
    calls = await unread(world, 8, 2 << 20)
    # The client's own queues are of this process here, too: count when the requests have left.
    await until(lambda: len(queued(world)) == 8, "eight replies that wait")
    budget.queued_bytes = 0
    await until(lambda: budget.queued_bytes > 256 << 10, "the count of what is queued")
    budget.max_bytes = 1 << 10
    with pytest.raises(RpcError) as refused:
        await world.channel().unary(INFER, request("small", 400), timeout_s=WAIT_S)
    assert refused.value.code is Code.RESOURCE_EXHAUSTED and "1024" in refused.value.message
    for call in calls:
        call.reset(8)
    await until(lambda: budget.queued_bytes == 0, "nothing queued any more")
    budget.max_bytes = 1 << 20
    small = request("small", 400)
    assert (await world.channel().unary(INFER, small, timeout_s=WAIT_S)).message == small
