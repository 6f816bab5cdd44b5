"""Cancelled calls: by the client, a deadline, a death, at every stage; nothing is left over."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import grpc
import grpc.aio
import pytest

from mesh.core.errors import Code
from mesh.wire.calls import AsyncUnary, ServerCall, StreamCall, Streaming
from mesh.wire.client import Channel, RpcError
from mesh.wire.frames import ErrorCode
from mesh.wire.server import Server
from tests.wire.relay_world import INFER, STREAM, World, hold, request
from tests.wire.waiting import WAIT_S, until

SLOW = "/test.Slow/Unary"
BOTH = "/test.Slow/Both"
FLOOD = "/test.Slow/Flood"


class Patient:
    """A server whose handlers wait until they are cancelled, and say so."""

    def __init__(self) -> None:
        self.started: list[ServerCall] = []
        self.cancelled: list[str] = []
        self.server = Server(
            {
                SLOW: AsyncUnary(self._unary),
                BOTH: Streaming(self._both),
                FLOOD: Streaming(self._flood),
            }
        )

    async def _unary(self, call: ServerCall, message: bytes) -> bytes:
        self.started.append(call)
        try:
            await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            self.cancelled.append("unary")
            raise
        raise AssertionError

    async def _both(self, call: StreamCall) -> None:
        self.started.append(call)
        try:
            async for message in call:
                await call.send(message)
            await asyncio.get_running_loop().create_future()
        finally:
            self.cancelled.append("both")

    async def _flood(self, call: StreamCall) -> None:
        self.started.append(call)
        try:
            while True:
                await call.send(bytes(100_000))
        finally:
            self.cancelled.append("flood")

    async def quiet(self) -> None:
        await until(lambda: not self.server._tasks and not self.server.inflight)
        assert all(call.cancelled for call in self.started)


@pytest.fixture
async def patient() -> AsyncIterator[Patient]:
    patient = Patient()
    yield patient
    await patient.server.close()


@pytest.fixture
async def ours(patient: Patient) -> AsyncIterator[Channel]:
    channel = Channel(f"127.0.0.1:{await patient.server.start()}")
    yield channel
    await channel.close()


@pytest.fixture
async def foreign(patient: Patient) -> AsyncIterator[grpc.aio.Channel]:
    port = await patient.server.start()
    options = [("grpc.use_local_subchannel_pool", 1)]
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=options) as channel:
        yield channel


async def test_our_client_cancels_a_unary_call(patient: Patient, ours: Channel) -> None:
    task = asyncio.create_task(ours.unary(SLOW, b"x", timeout_s=WAIT_S))
    await until(lambda: patient.started)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await patient.quiet()
    assert patient.cancelled == ["unary"]


async def test_our_client_cancels_before_there_is_a_connection(ours: Channel) -> None:
    task = asyncio.create_task(ours.unary(SLOW, b"x", timeout_s=WAIT_S))
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_our_client_cancels_a_stream(patient: Patient, ours: Channel) -> None:
    stream = ours.stream(BOTH, timeout_s=WAIT_S)
    await stream.send(b"x")
    replies = stream.__aiter__()
    assert await replies.__anext__() == b"x"
    stream.cancel()
    with pytest.raises(RpcError) as caught:
        await replies.__anext__()
    assert caught.value.code is Code.CANCELLED
    await patient.quiet()
    assert patient.cancelled == ["both"]


async def test_our_client_cancels_while_the_server_waits_for_its_window(
    patient: Patient, ours: Channel
) -> None:
    stream = ours.stream(FLOOD, timeout_s=WAIT_S)
    await stream.half_close()
    await until(lambda: patient.started and patient.started[0].queue is not None)
    stream.cancel()
    await patient.quiet()
    assert patient.cancelled == ["flood"]


async def test_our_client_dies(patient: Patient, ours: Channel) -> None:
    stream = ours.stream(BOTH, timeout_s=WAIT_S)
    await stream.send(b"x")
    await until(lambda: patient.started)
    ours.peer._links[0].abort()
    with pytest.raises(RpcError) as caught:
        async for _ in stream:
            pass
    assert caught.value.code is Code.UNAVAILABLE
    await patient.quiet()


async def test_grpcio_cancels(patient: Patient, foreign: grpc.aio.Channel) -> None:
    unary: Any = foreign.unary_unary(SLOW)(b"x", timeout=WAIT_S)
    both: Any = foreign.stream_stream(BOTH)(timeout=WAIT_S)
    await both.write(b"y")
    assert await both.read() == b"y"
    flood: Any = foreign.unary_stream(FLOOD)(b"z", timeout=WAIT_S)
    await until(lambda: len(patient.started) == 3)
    for call in (unary, both, flood):
        call.cancel()
    await patient.quiet()
    assert sorted(patient.cancelled) == ["both", "flood", "unary"]


@pytest.mark.parametrize("path", [SLOW, BOTH, FLOOD])
async def test_a_deadline_cancels_the_handler(
    patient: Patient, foreign: grpc.aio.Channel, path: str
) -> None:
    call: Any = foreign.stream_stream(path)(iter([b"x"]), timeout=0.2)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        async for _ in call:
            pass
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await patient.quiet()


async def test_the_servers_end_cancels_its_handlers(patient: Patient, ours: Channel) -> None:
    calls = [asyncio.create_task(ours.unary(SLOW, b"x", timeout_s=WAIT_S)) for _ in range(5)]
    await until(lambda: len(patient.started) == 5)
    await patient.server.close()
    for call in calls:
        with pytest.raises(RpcError) as caught:
            await call
        assert caught.value.code is Code.UNAVAILABLE
    assert patient.cancelled == ["unary"] * 5


# --- through the relay: the fixture holds that nothing is left --------------------------------


async def test_cancel_while_it_waits_for_its_model(world: World) -> None:
    world.dispatch.waiting = True
    task = asyncio.create_task(world.channel().unary(INFER, request("m", 5_000), timeout_s=WAIT_S))
    await until(lambda: world.dispatch.routed and world.relay.budget.used_bytes)
    task.cancel()
    await until(lambda: world.dispatch.ended)
    (call,) = world.dispatch.routed
    assert world.dispatch.codes == [Code.CANCELLED] and call.finished
    world.dispatch.forward(call, world.upstreams[0])  # a load that comes too late
    assert world.upstreams[0].inflight == 0
    assert world.instances[0].received == []


async def test_cancel_while_it_waits_for_a_connection(world: World) -> None:
    world.dispatch.waiting = True
    task = asyncio.create_task(world.channel().unary(INFER, request(), timeout_s=WAIT_S))
    await until(lambda: world.dispatch.routed)
    (call,) = world.dispatch.routed
    world.dispatch.forward(call, world.upstreams[0])  # begins to connect
    assert world.upstreams[0].inflight == 1
    call.reset(ErrorCode.CANCEL)
    call.on_reset(ErrorCode.CANCEL)  # as the client's RST_STREAM does
    with pytest.raises(RpcError):
        await task
    await until(lambda: world.upstreams[0].usable())
    assert world.instances[0].received == []


async def test_cancel_while_it_runs_reaches_the_instance(world: World) -> None:
    instance = world.instances[0]
    instance.answers.append(hold)
    task = asyncio.create_task(world.channel().unary(INFER, request(), timeout_s=WAIT_S))
    await until(lambda: instance.received)
    task.cancel()
    await until(lambda: instance.cancelled)
    assert world.dispatch.codes == [Code.CANCELLED]
    assert world.dispatch.failures == []


async def test_a_client_that_dies_cancels_all_its_calls(world: World) -> None:
    instance = world.instances[0]
    instance.answers += [hold] * 20
    channel = world.channel()
    tasks = [
        asyncio.create_task(channel.unary(INFER, request(), timeout_s=WAIT_S)) for _ in range(20)
    ]
    await until(lambda: len(instance.received) == 20)
    channel.peer._links[0].abort()
    await until(lambda: len(instance.cancelled) == 20)
    assert world.dispatch.codes == [Code.CANCELLED] * 20
    await asyncio.gather(*tasks, return_exceptions=True)


async def test_cancel_in_the_middle_of_an_upload(world: World) -> None:
    world.instances[0].reading.clear()
    stream = world.channel().stream(STREAM, timeout_s=WAIT_S)
    sending = asyncio.create_task(stream.send(request("m", 8 << 20)))
    await until(lambda: world.instances[0].streams and not sending.done())
    stream.cancel()
    await asyncio.gather(sending, return_exceptions=True)
    await until(lambda: world.instances[0].streams[0].cancelled)
    world.instances[0].reading.set()


async def test_cancel_of_a_reply_that_is_not_read(world: World) -> None:
    stream = world.channel().stream(STREAM, timeout_s=WAIT_S)
    for _ in range(3):  # the client takes one message and no more
        await stream.send(request("m", 2 << 20))
    await stream.half_close()
    await until(lambda: world.dispatch.routed and world.dispatch.routed[0].queue is not None)
    stream.cancel()
    await until(lambda: world.dispatch.ended)


async def test_a_deadline_while_it_waits(world: World) -> None:
    world.dispatch.waiting = True
    message = request("cold")
    with pytest.raises(RpcError, match="deadline passed") as caught:
        await world.channel().unary(INFER, message, metadata=[("grpc-timeout", "150m")])
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert "waited for model 'cold'" in caught.value.message
    assert world.dispatch.codes == [Code.DEADLINE_EXCEEDED]


async def test_a_deadline_while_it_runs(world: World) -> None:
    instance = world.instances[0]

    def late(call: ServerCall, message: bytes) -> None:
        call.deadline_s = float("inf")  # an instance that does not look at the clock

    await world.channel().unary(INFER, request("m"))  # what connects it has no part in this
    instance.answers.append(late)
    with pytest.raises(RpcError, match="worked on model") as caught:
        await world.channel().unary(INFER, request("m"), metadata=[("grpc-timeout", "500m")])
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    await until(lambda: instance.cancelled)
    assert world.dispatch.codes == [Code.OK, Code.DEADLINE_EXCEEDED]


async def test_what_is_left_of_the_deadline_is_passed_on(world: World) -> None:
    world.dispatch.waiting = True
    task = asyncio.create_task(world.channel().unary(INFER, request(), timeout_s=60.0))
    await until(lambda: world.dispatch.routed)
    (call,) = world.dispatch.routed
    call.deadline_s -= 30.0  # it has waited that long
    world.dispatch.forward(call, world.upstreams[0])
    await task
    left_s = world.instances[0].received[0].head.timeout_s
    assert left_s is not None and 0 < left_s <= 30.0


async def test_a_cancel_after_the_answer_changes_nothing(world: World) -> None:
    channel = world.channel()
    call = await channel.open(INFER, (), WAIT_S)
    message = request()
    call.send_data(b"\0" + len(message).to_bytes(4, "big") + message, True)
    while call.ended is None:
        await call.wait()
    call.reset(ErrorCode.CANCEL)
    assert (await channel.unary(INFER, message, timeout_s=WAIT_S)).message == message
    assert world.dispatch.codes == [0, 0]
