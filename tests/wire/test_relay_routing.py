"""Where a relayed call goes, and what arrives there."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import pytest

from mesh.core.errors import Code, NotFound
from mesh.wire import messages, relay_call
from mesh.wire.client import RpcError
from mesh.wire.limits import PUBLIC
from tests.wire.relay_world import ADD, INFER, STREAM, World, hold, request
from tests.wire.waiting import until


async def test_the_name_in_the_body(world: World) -> None:
    message = request("by-body")
    reply = await world.channel().unary(INFER, message, metadata=[("x-mine", "1")], timeout_s=60)
    assert reply.message == message
    (call,) = world.dispatch.routed
    assert (call.model_name, call.peeked_whole) == ("by-body", True)
    (received,) = world.instances[0].received
    assert received.message == message
    assert received.header(b"mm-model-id") == b"id-of-by-body"
    assert received.header(b"x-mine") == b"1"
    assert received.header(b"mm-vmodel-id") is None
    assert received.head.path == INFER
    assert received.header(b"grpc-timeout") is not None
    assert world.dispatch.codes == [0]


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("mm-model-id", "by-header"),
        ("mm-vmodel-id", "by-header"),
        ("mm-model-id-bin", base64.b64encode(b"by-header").decode()),
        ("mm-vmodel-id-bin", base64.b64encode(b"by-header").rstrip(b"=").decode()),
    ],
)
async def test_the_name_in_a_header(world: World, header: str, value: str) -> None:
    message = request("ignored")
    await world.channel().unary(INFER, message, metadata=[(header, value)], timeout_s=60)
    (call,) = world.dispatch.routed
    assert call.model_name == "by-header"
    (received,) = world.instances[0].received
    named = [v for n, v in received.head.fields if n.startswith(b"mm-model-id")]
    assert named == [b"id-of-by-header"], "the client's own header must not get through"
    assert received.header(b"mm-vmodel-id") == b"by-header"
    assert received.message == message


@pytest.mark.parametrize(
    ("path", "metadata", "message", "text"),
    [
        (INFER, [("mm-model-id", "a"), ("mm-vmodel-id", "b")], request(), "cannot both"),
        (INFER, [("mm-model-id", "")], request(), "empty"),
        (ADD, [], b"", "mm-model-id"),
        (INFER, [], b"", "names no model"),
        (INFER, [], b"\x0f\xff", "not a protobuf message"),
        (INFER, [], request(""), "names no model"),
    ],
    ids=["both", "empty-header", "no-header", "empty", "garbage", "no-name"],
)
async def test_no_route(
    world: World, path: str, metadata: list[tuple[str, str]], message: bytes, text: str
) -> None:
    with pytest.raises(RpcError, match=text) as caught:
        await world.channel().unary(path, message, metadata=metadata, timeout_s=60)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert world.dispatch.routed == [] and world.instances[0].received == []


async def test_the_dispatchers_error_reaches_the_client(world: World) -> None:
    world.dispatch.error = NotFound("model 'm' does not exist")
    with pytest.raises(RpcError, match="model 'm' does not exist") as caught:
        await world.channel().unary(INFER, request(), timeout_s=60)
    assert caught.value.code is Code.NOT_FOUND
    assert world.dispatch.codes == [Code.NOT_FOUND]


async def test_an_instances_error_and_trailers_reach_the_client(world: World) -> None:
    world.instances[0].answers.append(
        lambda call, _: call.fail_code(
            Code.INVALID_ARGUMENT, "Eingabe «x» fehlt", trailers=[("x-why", "because")]
        )
    )
    with pytest.raises(RpcError, match="Eingabe «x» fehlt") as caught:
        await world.channel().unary(INFER, request(), timeout_s=60)
    assert caught.value.code is Code.INVALID_ARGUMENT
    assert (b"x-why", b"because") in caught.value.trailers
    assert world.dispatch.codes == [Code.INVALID_ARGUMENT]


async def test_initial_metadata_and_trailers_reach_the_client(world: World) -> None:
    world.instances[0].answers.append(
        lambda call, message: call.reply(
            message, initial=[("x-first", "1")], trailers=[("x-last", "2"), ("mesh-secret", "3")]
        )
    )
    reply = await world.channel().unary(INFER, request(), timeout_s=60)
    assert (b"x-first", b"1") in reply.initial
    assert (b"x-last", b"2") in reply.trailers
    assert not [n for n, _ in reply.trailers if n.startswith(b"mesh-")]


async def test_what_only_the_mesh_may_say_is_taken_from_clients(world: World) -> None:
    metadata = [("mesh-peeked-name", "x"), ("mesh-rest-kind", "y"), ("mm-balanced", "true")]
    await world.channel().unary(INFER, request(), metadata=metadata, timeout_s=60)
    (received,) = world.instances[0].received
    names = {n for n, _ in received.head.fields if n.startswith((b"mesh-", b"mm-"))}
    assert names == {b"mm-model-id"}


@pytest.mark.parametrize("size", [0, 100, 70_000, 1 << 20, 4 << 20])
async def test_content_of_any_size(world: World, size: int) -> None:
    message = request("m", size)
    channel = world.channel()
    for _ in range(3):
        reply = await channel.unary(INFER, message, timeout_s=60)
        assert reply.message == message
    assert all(r.message == message for r in world.instances[0].received)
    assert {call.request_bytes for call in world.dispatch.routed} == {len(message) + 5}
    assert {call.response_bytes for call in world.dispatch.routed} == {len(message) + 5}


@pytest.mark.parametrize("size", [60_000, 4 << 20])
async def test_a_miss_waits_and_arrives_unchanged(world: World, size: int) -> None:
    """However large: beyond what is held the client waits with its window closed."""
    world.dispatch.waiting = True
    message = request("cold", size)
    pending = asyncio.create_task(world.channel().unary(INFER, message, timeout_s=60))
    expected = min(len(message) + 5, PUBLIC.stream_window_bytes)
    await until(lambda: world.relay.budget.used_bytes == expected)
    (call,) = world.dispatch.routed
    world.dispatch.forward(call, world.upstreams[1])
    assert (await pending).message == message
    assert world.instances[1].received[0].message == message


async def test_a_miss_for_which_no_memory_is_left_is_told_to_come_back(world: World) -> None:
    world.dispatch.waiting = True
    world.relay.budget.max_bytes = 10_000
    with pytest.raises(RpcError, match="retry shortly") as caught:
        await world.channel().unary(INFER, request("cold", 20_000), timeout_s=60)
    assert caught.value.code is Code.UNAVAILABLE
    assert any(name == b"grpc-retry-pushback-ms" for name, _ in caught.value.trailers)


async def test_tiny_pieces_of_a_held_request_are_joined(world: World) -> None:
    """20,000 frames of one byte must not take many times their memory, or be looked at each."""
    world.dispatch.waiting = True
    channel = world.channel()
    message = request("late", 20_000)
    raw = messages.prefix(message) + message
    call = await channel.open(INFER, (), 20.0)
    for position in range(len(raw)):
        call.send_data(raw[position : position + 1], False)
    await until(lambda: world.dispatch.routed)
    (routed,) = world.dispatch.routed
    await until(lambda: routed.request_bytes == len(raw))
    assert routed._held is not None and len(routed._held) <= 64
    world.dispatch.forward(routed, world.upstreams[0])
    call.send_data(b"", True)
    while call.ended is None:
        await call.wait()
    assert call.error is None and list(call.inbox) == [message]


async def test_a_name_behind_much_else_is_not_looked_for_at_every_drop(world: World) -> None:
    """Small fields, byte by byte: the message is scanned a logarithmic number of times."""
    channel = world.channel()
    message = b"\x90\x03\x00" * 7_000 + request("late", 10)
    raw = messages.prefix(message) + message
    call = await channel.open(INFER, (), 20.0)
    scans = 0
    real = relay_call.peek_model_name

    def counting(*args: Any, **kwargs: Any) -> Any:
        nonlocal scans
        scans += 1
        return real(*args, **kwargs)

    relay_call.peek_model_name = counting
    try:
        for position in range(len(raw)):
            call.send_data(raw[position : position + 1], position == len(raw) - 1)
        while call.ended is None:
            await call.wait()
    finally:
        relay_call.peek_model_name = real
    assert call.error is None and world.dispatch.routed[0].model_name == "late"
    assert scans < 40


async def test_the_peeked_name_is_checked_when_the_message_was_not_whole(world: World) -> None:
    message = request("m", 1 << 20)
    await world.channel().unary(INFER, message, timeout_s=60)
    assert not world.dispatch.routed[0].peeked_whole
    assert world.instances[0].received[0].header(b"mesh-peeked-name") == b"m"


async def test_many_fields_and_long_values_get_through(world: World) -> None:
    """A request at the bounds of the router is within the instance's, with all that is added."""
    own = 6  # :method :scheme :path :authority te content-type; and grpc-timeout
    metadata = [(f"x-{i}", "v") for i in range(PUBLIC.max_header_fields - own - 1)]
    await world.channel().unary(INFER, request("m", 300_000), metadata=metadata, timeout_s=60)
    long = [("x-a", "v" * 8_000), ("x-b", "v" * 7_800)]
    await world.channel().unary(INFER, request("m", 300_000), metadata=long, timeout_s=60)
    assert len(world.instances[0].received) == 2


async def test_streaming_both_ways(world: World) -> None:
    stream = world.channel().stream(STREAM, timeout_s=60)
    replies = stream.__aiter__()
    for turn in range(20):
        message = request("m", turn * 3_000)
        await stream.send(message)
        assert await replies.__anext__() == message
    await stream.half_close()
    assert [m async for m in replies] == []
    assert world.dispatch.codes == [0]


async def test_many_at_once_over_several_connections(world: World) -> None:
    channels = [world.channel() for _ in range(8)]
    sent = [request(f"m{i}", i * 7) for i in range(400)]
    replies = await asyncio.gather(
        *[channels[i % 8].unary(INFER, m, timeout_s=60) for i, m in enumerate(sent)]
    )
    assert [r.message for r in replies] == sent
    assert world.dispatch.codes == [0] * 400


async def test_an_answer_before_the_request_has_ended(world: World) -> None:
    """The instance refuses at the headers: the client need not send the rest."""
    world.instances[0].server.methods.clear()
    with pytest.raises(RpcError) as caught:
        await world.channel().unary(INFER, request("m", 8 << 20), timeout_s=60)
    assert caught.value.code is Code.UNIMPLEMENTED


async def test_a_client_that_speaks_no_protocol_costs_itself(world: World) -> None:
    world.instances[0].answers.append(hold)
    pending = asyncio.create_task(world.channel().unary(INFER, request(), timeout_s=60))
    await until(lambda: world.instances[0].received)
    host, port = world.address.split(":")
    for garbage in (b"GET / HTTP/1.1\r\n\r\n", bytes(100_000), b"\x16\x03\x01\x02\x00" * 99):
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(garbage)
        await asyncio.wait_for(reader.read(), 60)
        writer.close()
    world.instances[0].received[0].call.reply(b"fine")
    assert (await pending).message == b"fine"
