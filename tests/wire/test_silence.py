"""A peer that accepts and says nothing: noticed by PING, and its calls go elsewhere."""

from __future__ import annotations

import asyncio
import signal
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.core.errors import Code
from mesh.wire import messages
from mesh.wire.calls import ServerCall
from mesh.wire.client import Channel, PeerSilent, RpcError
from mesh.wire.limits import INSIDE, Patience
from mesh.wire.peer import NoConnection, Peer, Unconnected
from mesh.wire.relay import Failure, Upstream
from tests.wire.relay_world import ADD, INFER, World, hold, request
from tests.wire.waiting import until

BY_HEADER = [("mm-model-id", "m")]
# Quick to ask and slow to judge: a machine under load must not look silent.
EAGER = Patience(ping_after_s=0.0, ping_timeout_s=0.2, idle_ping_s=0.0, late_s=60.0)


class Paused:
    """Holds back what the server of an instance would read, as if its process were stopped."""

    def __init__(self, world: World, at: int) -> None:
        self._links = list(world.instances[at].server._links)

    def pause(self) -> None:
        for link in self._links:
            assert link.transport is not None
            link.transport.pause_reading()

    def go_on(self) -> None:
        for link in self._links:
            if link.transport is not None and not link.transport.is_closing():
                link.transport.resume_reading()


async def watched(peer: Peer, patience: Patience = EAGER) -> None:
    """One look, as the router's loop takes it."""
    now_s = time.monotonic()
    peer.watch(now_s, patience)
    peer.relieve(now_s, patience)
    await asyncio.sleep(0.01)


async def silent(peer: Peer, patience: Patience = EAGER) -> None:
    async with asyncio.timeout(60):
        while not peer.silent_since_s:
            await watched(peer, patience)


async def answering(peer: Peer, patience: Patience = EAGER) -> None:
    async with asyncio.timeout(60):
        while peer.silent_since_s:
            await watched(peer, patience)


async def in_flight(world: World, at: int = 0, path: str = INFER) -> asyncio.Task[object]:
    """A call that the instance has read and does not answer."""
    instance = world.instances[at]
    instance.answers.append(hold)
    call = world.channel().unary(path, request(), metadata=BY_HEADER, timeout_s=60)
    pending = asyncio.create_task(call)
    await until(lambda: instance.received)
    return pending


async def test_a_slow_call_on_a_live_instance_is_left_alone(world: World) -> None:
    pending = await in_flight(world)
    up = world.upstreams[0]
    conn = up.current
    assert conn is not None
    answers = 0
    while answers < 3:
        before_s = conn.last_read_s
        await until(lambda: True)
        await watched(up, replace(EAGER, ping_timeout_s=60.0))
        answers += conn.last_read_s > before_s
    assert not up.silent_since_s and not conn.silent
    world.instances[0].received[0].call.reply(b"late")
    assert (await pending).message == b"late"  # type: ignore[attr-defined]
    assert world.dispatch.failures == []


async def test_a_call_is_taken_off_an_instance_that_falls_silent(world: World) -> None:
    pending = await in_flight(world)
    paused = Paused(world, 0)
    paused.pause()
    await silent(world.upstreams[0])
    await watched(world.upstreams[0])
    assert (await pending).message == request()  # type: ignore[attr-defined]
    assert world.dispatch.kinds == [Failure.SILENT]
    assert len(world.instances[1].received) == 1
    paused.go_on()  # it reads the call's end then
    await until(lambda: world.instances[0].cancelled, "the RST_STREAM arrives")


async def test_a_write_stays_where_it_is_and_is_answered_when_the_instance_goes_on(
    world: World,
) -> None:
    pending = await in_flight(world, path=ADD)
    paused = Paused(world, 0)
    paused.pause()
    await silent(world.upstreams[0])
    await watched(world.upstreams[0])
    assert not pending.done() and world.dispatch.failures == []
    paused.go_on()
    await answering(world.upstreams[0])
    world.instances[0].received[0].call.reply(b"done")
    assert (await pending).message == b"done"  # type: ignore[attr-defined]


async def test_a_reply_that_has_begun_stays_where_it_is(world: World) -> None:
    def begin(call: ServerCall, message: bytes) -> None:
        call._send_initial(())
        call.send_data(b"\0\0\0\0\x04re", False)

    world.instances[0].answers.append(begin)
    channel = world.channel()
    call = await channel.open(INFER, (), 60.0)
    message = request()
    call.send_data(b"\0" + len(message).to_bytes(4, "big") + message, True)
    while call.initial is None:
        await call.wait()
    paused = Paused(world, 0)
    paused.pause()
    await silent(world.upstreams[0])
    await watched(world.upstreams[0])
    assert call.ended is None and world.dispatch.failures == []
    paused.go_on()
    answer = world.instances[0].received[0].call
    answer.send_data(b"st", False)
    answer.send_trailers(messages.OK_TRAILERS)
    while call.ended is None:
        await call.wait()
    assert call.error is None and list(call.inbox) == [b"rest"]


async def test_new_calls_do_not_use_a_silent_connection_and_trust_it_again(world: World) -> None:
    up = world.upstreams[0]
    await world.channel().unary(INFER, request(), timeout_s=60)
    conn = up.current
    paused = Paused(world, 0)
    paused.pause()
    await silent(up)
    assert up.current is None and up.usable() is None
    paused.go_on()
    await answering(up)
    assert up.usable() is conn


async def test_what_was_silent_for_long_is_closed_and_made_anew(world: World) -> None:
    """A path that is dead for good must not make an instance silent for ever."""
    up = world.upstreams[0]
    await world.channel().unary(INFER, request(), timeout_s=60)
    Paused(world, 0).pause()
    short = Patience(0.0, 0.2, 0.0, silent_close_s=0.3, late_s=60.0)
    await silent(up, short)
    async with asyncio.timeout(60):
        while up._links:
            await watched(up, short)
    await answering(up, short)
    await world.channel().unary(INFER, request(), timeout_s=60)
    assert len(world.instances[0].received) == 2 and world.dispatch.failures == []


async def test_a_broken_way_is_replaced_by_another_to_the_same_instance(world: World) -> None:
    """Long before the silent connection is given up; only that one says nothing."""
    up = world.upstreams[0]
    await world.channel().unary(INFER, request(), timeout_s=60)
    broken = up.current
    Paused(world, 0).pause()
    patience = replace(EAGER, second_way_s=0.0)
    await silent(up, patience)
    await answering(up, patience)
    assert up.current is not None and up.current is not broken
    assert broken is not None and broken.silent and not broken.closed
    await world.channel().unary(INFER, request(), timeout_s=60)
    assert len(world.instances[0].received) == 2 and world.dispatch.failures == []


async def test_nobody_is_blamed_for_the_time_in_which_the_watch_was_held_up(world: World) -> None:
    pending = await in_flight(world)
    up = world.upstreams[0]
    paused = Paused(world, 0)
    paused.pause()
    patience = Patience(ping_after_s=0.0, ping_timeout_s=1.0, late_s=0.5)
    start_s = time.monotonic()
    up.watch(start_s, patience)
    up.watch(start_s + 0.1, patience)  # the PING is out
    up.watch(start_s + 60.0, patience)
    assert not up.silent_since_s
    up.watch(start_s + 60.4, patience)
    assert not up.silent_since_s
    up.watch(start_s + 60.8, patience)
    up.watch(start_s + 61.2, patience)
    assert up.silent_since_s
    pending.cancel()
    paused.go_on()


async def test_a_connection_without_calls_is_asked_rarely(world: World) -> None:
    await world.channel().unary(INFER, request(), timeout_s=60)
    up = world.upstreams[0]
    conn = up.current
    assert conn is not None and not conn.streams
    patience = Patience(ping_after_s=0.0, idle_ping_s=2.0, late_s=60.0)
    up.watch(conn.last_read_s + 1.9, patience)
    assert not conn.ping_sent_s
    up.watch(conn.last_read_s + 2.0, patience)
    assert conn.ping_sent_s


async def test_by_default_an_instance_is_avoided_within_a_second_of_the_first_unanswered_ping(
    world: World,
) -> None:
    """Looked at every 100 ms, as the router does; the clock is the test's."""
    pending = await in_flight(world)
    up = world.upstreams[0]
    conn = up.current
    assert conn is not None
    now_s = stopped_s = conn.last_read_s
    ping_s = 0.0
    while not up.silent_since_s:
        now_s += 0.1
        assert now_s < stopped_s + 5
        if up.look_at_s <= now_s:
            up.watch(now_s, Patience())
        ping_s = ping_s or conn.ping_sent_s
    assert 0 < now_s - ping_s <= 1.0
    assert now_s - stopped_s <= 1.5
    pending.cancel()


async def test_pings_are_answers_of_their_own_and_few(world: World) -> None:
    """One PING is out at a time, however often one looks, also on what is silent."""
    pending = await in_flight(world)
    conn = world.upstreams[0].current
    assert conn is not None
    paused = Paused(world, 0)
    paused.pause()
    sent: list[bytes] = []
    control = conn.control
    conn.control = lambda frame: (sent.append(frame), control(frame))[1]  # type: ignore
    for _ in range(20):
        world.upstreams[0].watch(time.monotonic(), EAGER)
    assert len(sent) == 1
    conn.control = control  # type: ignore[method-assign]
    pending.cancel()
    paused.go_on()


# ---- waiting for a connection --------------------------------------------------------------------


@pytest.fixture
async def mute() -> AsyncIterator[str]:
    """The address of a peer that accepts and never says a word."""
    gone = asyncio.Event()

    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await gone.wait()
        writer.close()

    server = await asyncio.start_server(say_nothing, "127.0.0.1", 0)
    yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"
    gone.set()
    server.close()
    await server.wait_closed()


async def test_a_call_that_waits_for_a_connection_goes_elsewhere_even_a_write(
    world: World, mute: str
) -> None:
    """It was never delivered."""
    up = Upstream(mute)
    world.dispatch.upstreams.insert(0, up)
    pending = asyncio.create_task(
        world.channel().unary(ADD, b"1", metadata=BY_HEADER, timeout_s=60)
    )
    await until(lambda: world.dispatch.routed)
    await silent(up)
    async with asyncio.timeout(60):
        while not pending.done():
            await watched(up)
    assert (await pending).message == b"1"
    assert world.dispatch.kinds == [Failure.CONNECT]


async def test_the_deadline_of_a_call_that_waits_for_a_connection_is_kept(
    world: World, mute: str
) -> None:
    channel = world.channel()
    await channel.unary(INFER, request(), timeout_s=60)  # its own connection stands
    world.dispatch.upstreams.insert(0, Upstream(mute))
    with pytest.raises(RpcError) as caught:
        await channel.unary(INFER, request(), timeout_s=0.5)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    await until(lambda: world.dispatch.codes == [Code.OK, Code.DEADLINE_EXCEEDED])
    world.upstreams[0].abort()  # who waits there is told, and must not be counted any more


async def test_too_many_that_wait_for_a_connection_are_told_that_there_is_no_room(
    mute: str,
) -> None:
    up = Upstream(mute, limits=replace(INSIDE, max_waiting_for_connection=2))
    found: list[object] = []
    for _ in range(3):
        up.acquire(found.append)
    [refused] = found
    assert isinstance(refused, NoConnection) and refused.why is Unconnected.FULL
    up.abort()
    assert [x.why for x in found[1:]] == [Unconnected.CLOSED] * 2  # type: ignore[attr-defined]


async def test_an_instance_with_no_room_for_a_call_is_overloaded_not_gone(
    world: World, mute: str
) -> None:
    up = Upstream(mute, limits=replace(INSIDE, max_waiting_for_connection=0))
    world.dispatch.upstreams.insert(0, up)
    await world.channel().unary(INFER, request(), timeout_s=60)
    assert world.dispatch.kinds == [Failure.OVERLOADED]


# ---- a router's own calls ------------------------------------------------------------------------


async def test_an_own_call_to_a_silent_peer_ends_soon(world: World) -> None:
    instance = world.instances[0]
    channel = Channel(instance.address)
    world.channels.append(channel)
    instance.answers.append(hold)
    pending = asyncio.create_task(channel.unary(INFER, b"x", timeout_s=600))
    await until(lambda: instance.received)
    paused = Paused(world, 0)
    paused.pause()
    await silent(channel.peer)
    await watched(channel.peer)
    with pytest.raises(PeerSilent) as caught:
        await pending
    assert caught.value.code is Code.UNAVAILABLE
    paused.go_on()


# ---- a stopped process ---------------------------------------------------------------------------

CHILD = """
import asyncio
from mesh.wire.calls import Unary
from mesh.wire.limits import INSIDE
from mesh.wire.server import Server

async def main():
    server = Server({"/x/Y": Unary(lambda call, message: call.reply(message))}, limits=INSIDE)
    print(await server.start(), flush=True)
    await asyncio.Event().wait()

asyncio.run(main())
"""


class Child:
    def __init__(self, process: asyncio.subprocess.Process, port: int) -> None:
        self.process = process
        self.address = f"127.0.0.1:{port}"


@pytest.fixture
async def child() -> AsyncIterator[Child]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CHILD, stdout=asyncio.subprocess.PIPE, cwd=Path(__file__).parents[2]
    )
    assert process.stdout is not None
    try:
        yield Child(process, int(await process.stdout.readline()))
    finally:
        process.kill()
        await process.wait()


async def test_a_stopped_process_accepts_but_no_call_waits_long_for_it(child: Child) -> None:
    """The kernel completes the handshake of the connection; SETTINGS never come."""
    child.process.send_signal(signal.SIGSTOP)
    up = Upstream(child.address)
    found: list[object] = []
    up.acquire(found.append)
    short = Patience(ping_after_s=0.1, ping_timeout_s=0.2, late_s=60.0)
    await silent(up, short)
    async with asyncio.timeout(60):
        while not found:
            await watched(up, short)
    assert "no connection" in str(found[0])
    child.process.send_signal(signal.SIGCONT)
    await answering(up, short)
    assert up.usable() is not None
    up.abort()


async def test_a_process_that_is_stopped_and_goes_on_answers_the_calls_that_stayed(
    child: Child,
) -> None:
    channel = Channel(child.address)
    await channel.unary("/x/Y", b"1", timeout_s=60)
    child.process.send_signal(signal.SIGSTOP)
    pending = asyncio.create_task(channel.unary("/x/Y", b"2", timeout_s=60))
    await silent(channel.peer)
    await watched(channel.peer)
    with pytest.raises(RpcError):
        await pending
    child.process.send_signal(signal.SIGCONT)
    await answering(channel.peer)
    assert (await channel.unary("/x/Y", b"3", timeout_s=60)).message == b"3"
    await channel.close()
