"""Refusals and dead instances cost the client nothing where a retry is safe."""

from __future__ import annotations

import asyncio

import pytest

from mesh.core.errors import Code
from mesh.wire.calls import ServerCall
from mesh.wire.client import RpcError
from mesh.wire.frames import ErrorCode
from mesh.wire.relay import Failure, Upstream
from tests.wire.relay_world import ADD, INFER, STREAM, World, hold, refuse, request
from tests.wire.waiting import until

BY_HEADER = [("mm-model-id", "m")]


@pytest.mark.parametrize("reason", ["not-here", "draining", "overloaded"])
@pytest.mark.parametrize("size", [10, 100_000])
async def test_a_refusal_is_sent_elsewhere_with_the_same_bytes(
    world: World, reason: str, size: int
) -> None:
    first, second = world.instances
    first.answers.append(refuse(reason))
    message = request("m", size)
    reply = await world.channel().unary(INFER, message, timeout_s=60)
    assert reply.message == message
    assert [r.message for r in second.received] == [message]
    assert world.dispatch.kinds == [Failure(reason)]
    assert world.dispatch.codes == [0] and world.dispatch.routed[0].attempts == 2


async def test_a_refusal_at_the_headers_of_a_request_that_is_still_coming(world: World) -> None:
    """The client goes on sending; what had come already and what comes arrive in order."""

    def accept(head: object) -> object:
        from mesh.core.errors import Unavailable

        return Unavailable("scripted"), [("mesh-error", "not-here")]

    from mesh.wire.calls import Unary

    first, second = world.instances
    first.server.methods[INFER] = Unary(hold, accept=accept)  # type: ignore[arg-type]
    message = request("m", 4 << 20)
    reply = await world.channel().unary(INFER, message, timeout_s=60)
    assert reply.message == message and second.received[0].message == message
    assert world.dispatch.kinds == [Failure.NOT_HERE]


async def test_a_refused_write_is_retried_for_it_was_not_carried_out(world: World) -> None:
    world.instances[0].answers.append(refuse("draining"))
    reply = await world.channel().unary(ADD, b"1", metadata=BY_HEADER, timeout_s=60)
    assert reply.message == b"1" and world.dispatch.kinds == [Failure.DRAINING]


async def test_all_refuse(world: World) -> None:
    for instance in world.instances:
        instance.answers.append(refuse("overloaded"))
    with pytest.raises(RpcError, match="no instance is left"):
        await world.channel().unary(INFER, request(), timeout_s=60)
    assert world.dispatch.codes == [Code.UNAVAILABLE]


async def test_an_instance_that_dies_before_it_answers(world: World) -> None:
    first, second = world.instances
    first.answers.append(hold)
    message = request("m", 50_000)
    pending = asyncio.create_task(world.channel().unary(INFER, message, timeout_s=60))
    await until(lambda: first.received)
    first.kill()
    assert (await pending).message == message
    assert second.received[0].message == message
    assert world.dispatch.kinds == [Failure.LOST]


async def test_a_write_is_not_carried_out_twice(world: World) -> None:
    first, second = world.instances
    first.answers.append(hold)
    call = world.channel().unary(ADD, b"1", metadata=BY_HEADER, timeout_s=60)
    pending = asyncio.create_task(call)
    await until(lambda: first.received)
    first.kill()
    with pytest.raises(RpcError, match=r"lost while .* delivered") as caught:
        await pending
    assert caught.value.code is Code.UNAVAILABLE
    assert second.received == [] and world.dispatch.failures == []


async def test_a_request_too_large_to_be_held_is_not_sent_again(world: World) -> None:
    first, second = world.instances
    first.answers.append(hold)
    pending = asyncio.create_task(world.channel().unary(INFER, request("m", 2 << 20), timeout_s=60))
    await until(lambda: first.received)
    first.kill()
    with pytest.raises(RpcError, match=r"lost while .* too large to be held") as caught:
        await pending
    assert caught.value.code is Code.UNAVAILABLE and second.received == []


async def test_a_late_refusal_of_a_request_too_large_says_so(world: World) -> None:
    world.instances[0].answers.append(refuse("overloaded"))
    with pytest.raises(RpcError, match=r"did not take .* \(overloaded\).* too large"):
        await world.channel().unary(INFER, request("m", 2 << 20), timeout_s=60)


async def test_an_instance_that_dies_in_the_middle_of_its_reply(world: World) -> None:
    first, _ = world.instances

    def half(call: ServerCall, message: bytes) -> None:
        call._send_initial(())
        call.send_data(b"\0\0\0\0\x09abc", False)

    first.answers.append(half)
    channel = world.channel()
    call = await channel.open(INFER, (), 10.0)
    message = request()
    call.send_data(b"\0" + len(message).to_bytes(4, "big") + message, True)
    while call.initial is None:
        await call.wait()
    first.kill()
    while call.ended is None:
        await call.wait()
    assert call.error is not None and call.error.code is Code.UNAVAILABLE
    assert "middle of its reply" in call.error.message
    assert world.dispatch.failures == [] and world.dispatch.codes == [Code.UNAVAILABLE]


async def test_nobody_listens(world: World) -> None:
    await world.instances[0].server.close()
    message = request()
    assert (await world.channel().unary(INFER, message, timeout_s=60)).message == message
    assert world.dispatch.kinds == [Failure.CONNECT]


async def test_an_address_that_is_none(world: World) -> None:
    world.dispatch.upstreams.insert(0, Upstream("nonsense"))
    message = request()
    assert (await world.channel().unary(INFER, message, timeout_s=60)).message == message
    assert world.dispatch.kinds == [Failure.CONNECT]


async def test_a_refused_stream_was_never_delivered(world: World) -> None:
    """Even a write may go elsewhere."""

    def reset(call: ServerCall, message: bytes) -> None:
        call.reset(ErrorCode.REFUSED_STREAM)

    world.instances[0].answers.append(reset)
    reply = await world.channel().unary(ADD, b"1", metadata=BY_HEADER, timeout_s=60)
    assert reply.message == b"1" and world.dispatch.kinds == [Failure.REFUSED]


async def test_a_reset_by_the_instance(world: World) -> None:
    world.instances[0].answers.append(lambda call, _: call.reset(ErrorCode.INTERNAL_ERROR))
    message = request()
    assert (await world.channel().unary(INFER, message, timeout_s=60)).message == message
    assert world.dispatch.kinds == [Failure.LOST]


async def test_a_stream_that_broke_is_not_sent_again(world: World) -> None:
    stream = world.channel().stream(STREAM, timeout_s=60)
    await stream.send(request())
    await until(lambda: world.instances[0].streams)
    replies = stream.__aiter__()
    await replies.__anext__()
    world.instances[0].kill()
    with pytest.raises(RpcError) as caught:
        await replies.__anext__()
    assert caught.value.code is Code.UNAVAILABLE and world.instances[1].streams == []


async def test_goaway_of_an_instance_loses_no_call(world: World) -> None:
    """Calls go on while the first instance drains; what it has taken, it answers."""
    first, second = world.instances
    first.answers += [hold] * 4
    channel = world.channel()
    slow = [
        asyncio.create_task(channel.unary(INFER, request(f"s{i}"), timeout_s=60))
        for i in (1, 2, 3, 4)
    ]
    await until(lambda: len(first.received) == 4)
    more = [
        asyncio.create_task(channel.unary(INFER, request(f"n{i}"), timeout_s=60)) for i in range(50)
    ]
    drained = asyncio.create_task(first.server.drain(10.0))
    late = [
        asyncio.create_task(channel.unary(INFER, request(f"l{i}"), timeout_s=60)) for i in range(50)
    ]
    await asyncio.gather(*more, *late)
    for received in first.received[:4]:
        received.call.reply(received.message)
    replies = await asyncio.gather(*slow)
    assert [r.message for r in replies] == [request(f"s{i}") for i in (1, 2, 3, 4)]
    await drained
    assert set(world.dispatch.codes) == {0}
    assert set(world.dispatch.kinds) <= {Failure.REFUSED, Failure.CONNECT}
    assert all(call.attempts <= 2 for call in world.dispatch.routed)
    await until(lambda: not world.upstreams[0]._links)
    assert len(first.received) + len(second.received) == 104


async def test_reconnects_when_the_instance_is_back(world: World) -> None:
    channel = world.channel()
    await channel.unary(INFER, request(), timeout_s=60)
    world.instances[0].kill()
    await until(lambda: not world.upstreams[0]._links)
    await channel.unary(INFER, request(), timeout_s=60)
    assert len(world.instances[0].received) == 2 and world.dispatch.failures == []
