"""grpcio's client against our server, directly and through the relay; our client and its server."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from concurrent import futures

import grpc
import grpc.aio
import pytest

from mesh.core.errors import Code, FailedPrecondition, Unavailable
from mesh.wire.calls import AsyncUnary, ServerCall, StreamCall, Streaming, Unary
from mesh.wire.client import Channel, RpcError
from mesh.wire.server import Server
from tests.wire.relay_world import INFER, STREAM, World, make_world, request, running
from tests.wire.waiting import until

ECHO = "/test.Echo/Unary"
SLOW = "/test.Echo/Slow"
BIDI = "/test.Echo/Bidi"
COLLECT = "/test.Echo/Collect"
SPREAD = "/test.Echo/Spread"
METADATA = "/test.Echo/Metadata"
FAIL = "/test.Echo/Fail"
OPTIONS = [
    ("grpc.max_receive_message_length", -1),
    ("grpc.max_send_message_length", -1),
    ("grpc.use_local_subchannel_pool", 1),
]
SIZES = [0, 1, 400, 16_379, 16_384, 65_536, 1 << 20, (16 << 20)]


def content(size: int) -> bytes:
    return (bytes(range(256)) * (size // 256 + 1))[:size]


def _metadata(call: ServerCall, message: bytes) -> None:
    mine = [(n.decode(), v) for n, v in call.head.metadata if n.startswith(b"x-")]
    call.reply(message, initial=mine, trailers=[("x-last", "end"), ("x-last-bin", b"AAEC")])


def _fail(call: ServerCall, message: bytes) -> None:
    if message == b"retry":
        call.fail(Unavailable("später: 100 % voll\n", retry_after_ms=250))
    else:
        call.fail(FailedPrecondition("ungültig"), trailers=[("x-why", "because")])


async def _slow(call: ServerCall, message: bytes) -> bytes:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


async def _bidi(call: StreamCall) -> None:
    async for message in call:
        await call.send(message)


async def _collect(call: StreamCall) -> None:
    await call.send(b"".join([message async for message in call]))


async def _spread(call: StreamCall) -> None:
    async for message in call:
        for part in message.split(b","):
            await call.send(part)


METHODS = {
    ECHO: Unary(lambda call, message: call.reply(message)),
    METADATA: Unary(_metadata),
    FAIL: Unary(_fail),
    SLOW: AsyncUnary(_slow),
    BIDI: Streaming(_bidi),
    COLLECT: Streaming(_collect),
    SPREAD: Streaming(_spread),
}


@pytest.fixture
async def server() -> AsyncIterator[Server]:
    server = Server(METHODS)
    yield server
    await server.close()


@pytest.fixture
async def channel(server: Server) -> AsyncIterator[grpc.aio.Channel]:
    port = await server.start()
    async with grpc.aio.insecure_channel(f"127.0.0.1:{port}", options=OPTIONS) as channel:
        yield channel


def multi(channel: grpc.aio.Channel, path: str, **options: object) -> grpc.aio.StreamStreamCall:
    return channel.stream_stream(path)(**options)


@pytest.mark.parametrize("size", SIZES)
async def test_content(channel: grpc.aio.Channel, size: int) -> None:
    message = content(size)
    assert await channel.unary_unary(ECHO)(message, timeout=60) == message


async def test_sizes_mixed_at_once(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary(ECHO)
    sizes = [SIZES[i % 7] + i for i in range(150)]  # over MAX_CONCURRENT_STREAMS
    replies = await asyncio.gather(*[call(content(size), timeout=30) for size in sizes])
    assert [len(reply) for reply in replies] == sizes
    assert all(reply == content(len(reply)) for reply in replies)


async def test_over_the_limit(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(ECHO)(bytes((16 << 20) + 1), timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "16777217 bytes" in (caught.value.details() or "")
    assert await channel.unary_unary(ECHO)(b"next", timeout=60) == b"next"


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
@pytest.mark.parametrize("size", [10, 1_000, 3 << 20])
async def test_compressed_requests(
    channel: grpc.aio.Channel, algorithm: grpc.Compression, size: int
) -> None:
    message = content(size)
    call = channel.unary_unary(ECHO)(message, compression=algorithm, timeout=60)
    assert await call == message


async def test_a_compressed_request_over_the_limit(channel: grpc.aio.Channel) -> None:
    call = channel.unary_unary(ECHO)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await call(bytes(50 << 20), compression=grpc.Compression.Gzip, timeout=60)
    assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED


async def test_unknown_method(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError, match="/no/Such") as caught:
        await channel.unary_unary("/no/Such")(b"", timeout=60)
    assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED


async def test_metadata_both_ways(channel: grpc.aio.Channel) -> None:
    sent = (("x-text", "words and spaces"), ("x-bin", bytes(range(256))), ("x-text", "twice"))
    call = channel.unary_unary(METADATA)(b"m", metadata=sent, timeout=60)
    assert await call == b"m"
    assert sorted(await call.initial_metadata(), key=repr) == sorted(sent, key=repr)
    assert list(await call.trailing_metadata()) == [("x-last", "end"), ("x-last-bin", b"\0\1\2")]


async def test_status_with_utf8(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(FAIL)(b"", timeout=60)
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    assert caught.value.details() == "ungültig"
    assert ("x-why", "because") in list(caught.value.trailing_metadata())


async def test_status_with_a_hint_to_retry(channel: grpc.aio.Channel) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(FAIL)(b"retry", timeout=60)
    assert caught.value.details() == "später: 100 % voll\n"
    assert ("grpc-retry-pushback-ms", "250") in list(caught.value.trailing_metadata())


async def test_a_deadline(channel: grpc.aio.Channel, server: Server) -> None:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(SLOW)(b"", timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await until(lambda: server.inflight == 0 and not server._tasks)


async def test_both_ways(channel: grpc.aio.Channel) -> None:
    call = multi(channel, BIDI, timeout=60)
    for size in SIZES[:-1]:
        await call.write(content(size))
        assert await call.read() == content(size)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF and await call.code() is grpc.StatusCode.OK


async def test_both_ways_with_pages_in_flight(channel: grpc.aio.Channel) -> None:
    call = multi(channel, BIDI, timeout=30)
    sizes = [1 << 16, 3, 1 << 20, 0, 200_000] * 5

    async def write() -> None:
        for size in sizes:
            await call.write(content(size))
        await call.done_writing()

    writing = asyncio.create_task(write())
    got = [message async for message in call]
    await writing
    assert got == [content(size) for size in sizes]


async def test_client_streaming(channel: grpc.aio.Channel) -> None:
    parts = [content(i * 1_000) for i in range(100)]
    call = channel.stream_unary(COLLECT)(iter(parts), timeout=60)
    assert await call == b"".join(parts)


async def test_server_streaming(channel: grpc.aio.Channel) -> None:
    message = b",".join(b"%d" % i for i in range(2_000))
    call = channel.unary_stream(SPREAD)(message, timeout=60)
    assert [part async for part in call] == message.split(b",")


async def test_an_empty_stream(channel: grpc.aio.Channel) -> None:
    call = multi(channel, BIDI, timeout=60)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF and await call.code() is grpc.StatusCode.OK


async def test_a_unix_socket(server: Server, tmp_path: object) -> None:
    path = f"{tmp_path}/mesh.sock"
    await server.start_unix(path)
    async with grpc.aio.insecure_channel(f"unix:{path}") as channel:
        assert await channel.unary_unary(ECHO)(b"over a file", timeout=60) == b"over a file"
    ours = Channel(f"unix:{path}")
    assert (await ours.unary(ECHO, b"ours", timeout_s=60)).message == b"ours"
    await ours.close()


# --- through the relay ------------------------------------------------------------------------


@pytest.fixture
async def relayed() -> AsyncIterator[tuple[World, grpc.aio.Channel]]:
    async with (
        running(await make_world()) as world,
        grpc.aio.insecure_channel(world.address, options=OPTIONS) as channel,
    ):
        yield world, channel


@pytest.mark.parametrize("size", [0, 400, 16_384, 65_536, 1 << 20, 4 << 20, 15 << 20])
async def test_relayed_content(relayed: tuple[World, grpc.aio.Channel], size: int) -> None:
    _, channel = relayed
    message = request("m", size)
    calls = [channel.unary_unary(INFER)(message, timeout=30) for _ in range(3)]
    assert [await call for call in calls] == [message] * 3


@pytest.mark.parametrize("algorithm", [grpc.Compression.Gzip, grpc.Compression.Deflate])
async def test_relayed_compressed(
    relayed: tuple[World, grpc.aio.Channel], algorithm: grpc.Compression
) -> None:
    world, channel = relayed
    for size in (100, 4 << 20):
        message = request("packed", size)
        call = channel.unary_unary(INFER)(message, compression=algorithm, timeout=60)
        assert await call == message
    assert {call.model_name for call in world.dispatch.routed} == {"packed"}
    assert {r.message for r in world.instances[0].received} == {
        request("packed", 100),
        request("packed", 4 << 20),
    }


async def test_relayed_streams(relayed: tuple[World, grpc.aio.Channel]) -> None:
    _, channel = relayed
    call = multi(channel, STREAM, timeout=60)
    for size in (0, 10, 70_000, 1 << 20):
        await call.write(request("m", size))
        assert await call.read() == request("m", size)
    await call.done_writing()
    assert await call.read() is grpc.aio.EOF and await call.code() is grpc.StatusCode.OK


async def test_relayed_status_and_deadline(relayed: tuple[World, grpc.aio.Channel]) -> None:
    world, channel = relayed
    world.instances[0].answers.append(
        lambda call, _: call.fail_code(Code.NOT_FOUND, "gibt es nicht: «m»")
    )
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(INFER)(request(), timeout=60)
    assert caught.value.details() == "gibt es nicht: «m»"
    world.dispatch.waiting = True
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await channel.unary_unary(INFER)(request(), timeout=0.2)
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED


# --- our client and grpcio's server -----------------------------------------------------------


class Foreign(grpc.GenericRpcHandler):
    """A grpcio server's methods."""

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        made: dict[str, Callable[[], grpc.RpcMethodHandler]] = {
            ECHO: lambda: grpc.unary_unary_rpc_method_handler(lambda message, _: message),
            BIDI: lambda: grpc.stream_stream_rpc_method_handler(lambda messages, _: messages),
            METADATA: lambda: grpc.unary_unary_rpc_method_handler(self._metadata),
            FAIL: lambda: grpc.unary_unary_rpc_method_handler(self._fail),
            SLOW: lambda: grpc.unary_unary_rpc_method_handler(self._slow),
        }
        make = made.get(details.method)
        return make() if make else None

    def _metadata(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        mine = [(k, v) for k, v in context.invocation_metadata() if k.startswith("x-")]
        context.send_initial_metadata(mine)
        context.set_trailing_metadata([("x-last", "end")])
        return message

    def _fail(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "ungültig: 100 %")
        raise AssertionError

    def _slow(self, message: bytes, context: grpc.ServicerContext) -> bytes:
        while context.is_active():
            time.sleep(0.01)
        return b""


@pytest.fixture(params=[None, grpc.Compression.Gzip], ids=["plain", "gzip"])
async def foreign(request: pytest.FixtureRequest) -> AsyncIterator[Channel]:
    server = grpc.server(
        futures.ThreadPoolExecutor(8),
        options=[*OPTIONS, ("grpc.max_concurrent_streams", 20)],
        compression=request.param,
    )
    server.add_generic_rpc_handlers((Foreign(),))
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    channel = Channel(f"127.0.0.1:{port}")
    yield channel
    await channel.close()
    await asyncio.to_thread(server.stop(None).wait, 10)


@pytest.mark.parametrize("size", SIZES)
async def test_content_of_a_foreign_server(foreign: Channel, size: int) -> None:
    message = content(size)
    assert (await foreign.unary(ECHO, message, timeout_s=60)).message == message


async def test_more_calls_than_a_foreign_server_takes_at_once(foreign: Channel) -> None:
    calls = [foreign.unary(ECHO, content(i * 100), timeout_s=60) for i in range(100)]
    replies = await asyncio.gather(*calls)
    assert [reply.message for reply in replies] == [content(i * 100) for i in range(100)]


async def test_both_ways_with_a_foreign_server(foreign: Channel) -> None:
    stream = foreign.stream(BIDI, timeout_s=60)
    replies = stream.__aiter__()
    for size in SIZES[:-1]:
        await stream.send(content(size))
        assert await replies.__anext__() == content(size)
    await stream.half_close()
    assert [message async for message in replies] == []


async def test_metadata_of_a_foreign_server(foreign: Channel) -> None:
    sent = [("x-text", "words"), ("x-data-bin", b"AAEC")]
    reply = await foreign.unary(METADATA, b"m", metadata=sent, timeout_s=60)
    assert (b"x-text", b"words") in reply.initial and (b"x-last", b"end") in reply.trailers
    assert [v.rstrip(b"=") for n, v in reply.initial if n == b"x-data-bin"] == [b"AAEC"]


async def test_status_of_a_foreign_server(foreign: Channel) -> None:
    with pytest.raises(RpcError, match="ungültig: 100 %") as caught:
        await foreign.unary(FAIL, b"", timeout_s=60)
    assert caught.value.code is Code.FAILED_PRECONDITION
    with pytest.raises(RpcError) as caught:
        await foreign.unary("/no/Such", b"", timeout_s=60)
    assert caught.value.code is Code.UNIMPLEMENTED


async def test_deadline_with_a_foreign_server(foreign: Channel) -> None:
    with pytest.raises(RpcError) as caught:
        await foreign.unary(SLOW, b"", timeout_s=0.2)
    assert caught.value.code is Code.DEADLINE_EXCEEDED
    assert (await foreign.unary(ECHO, b"next", timeout_s=60)).message == b"next"
