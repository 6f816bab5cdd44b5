"""Calls by whole messages: what counts as a failed attempt, retries, bounds."""

from __future__ import annotations

import asyncio

import pytest

from mesh.core.errors import (
    Code,
    DeadlineExceeded,
    InvalidArgument,
    MeshError,
    ResourceExhausted,
    Unavailable,
)
from mesh.wire.client import NotSent, PeerSilent, Reply, RpcError
from mesh.wire.relay import Failure
from router.gateway import Gateway, failure_of

PATH = "/pkg.Service/Method"


def refusal(name: str) -> RpcError:
    return RpcError(
        Code.UNAVAILABLE, "refused", ((b"grpc-status", b"14"), (b"mesh-error", name.encode()))
    )


@pytest.mark.parametrize(
    ("error", "failure"),
    [
        (refusal("not-here"), Failure.NOT_HERE),
        (refusal("draining"), Failure.DRAINING),
        (refusal("overloaded"), Failure.OVERLOADED),
        (RpcError(Code.UNAVAILABLE, "connection lost"), Failure.LOST),
        (Unavailable("has left the mesh"), Failure.CONNECT),
        (NotSent(Code.UNAVAILABLE, "refused"), Failure.CONNECT),
        (NotSent(Code.RESOURCE_EXHAUSTED, "connections are full"), Failure.OVERLOADED),
        (PeerSilent(Code.UNAVAILABLE, "no answer to a PING"), Failure.SILENT),
        (RpcError(Code.UNAVAILABLE, "the model's", ((b"grpc-status", b"14"),)), None),
        (RpcError(Code.INVALID_ARGUMENT, "x", ((b"grpc-status", b"3"),)), None),
        (RpcError(Code.DEADLINE_EXCEEDED, "x"), None),
        (InvalidArgument("x"), None),
    ],
)
def test_what_is_a_failed_attempt(error: MeshError, failure: Failure | None) -> None:
    assert failure_of(error) is failure


class Script:
    """Answers by address; a channel that asks it."""

    def __init__(self, world) -> None:
        self.answers: dict[str, list[bytes | MeshError]] = {}
        self.asked: list[tuple[str, str, bytes, tuple]] = []
        self.gate = asyncio.Event()
        self.gate.set()
        make = world.peers._make_channel
        script = self

        class Channel:
            def __init__(self, address: str) -> None:
                self.address = address
                self.internal = make(address)
                self.peer = self.internal.peer

            async def unary(self, path, message, *, metadata=(), timeout_s=None) -> Reply:
                if path != PATH:
                    return await self.internal.unary(path, message)
                script.asked.append((self.address, path, message, tuple(metadata)))
                await script.gate.wait()
                answers = script.answers.get(self.address, [])
                answer = answers.pop(0) if answers else b"ok"
                if isinstance(answer, MeshError):
                    raise answer
                return Reply(answer, (), ())

            async def close(self) -> None:
                pass

        world.peers._make_channel = Channel


async def test_it_carries_the_concrete_model_and_is_counted(world) -> None:
    script = Script(world)
    gateway = Gateway(world.dispatcher, world.peers)
    world.instance("a")
    world.model("iris-1")
    world.alias("iris", "iris-1")
    reply = await gateway.call(PATH, "iris", b"body", metadata=(("k", "v"),), label="/x/ModelInfer")
    assert reply.message == b"ok"
    assert script.asked == [("a:1", PATH, b"body", (("mm-model-id", "iris-1"), ("k", "v")))]
    assert world.metrics.value("api_request", "ModelInfer", "OK") == 1
    assert world.dispatcher.inflight == 0


async def test_a_refusal_is_tried_elsewhere(world) -> None:
    script = Script(world)
    gateway = Gateway(world.dispatcher, world.peers)
    for instance_id in ("a", "b"):
        world.instance(instance_id)
        world.copy("m", instance_id)
    world.model("m")
    script.answers["a:1"] = [refusal("draining")]
    assert (await gateway.call(PATH, "m", b"")).message == b"ok"
    assert [address for address, *_ in script.asked] == ["a:1", "b:1"]
    assert world.dispatcher.inflight_on("m", "b") == 0


async def test_the_model_s_answer_keeps_its_code_and_hint(world) -> None:
    script = Script(world)
    gateway = Gateway(world.dispatcher, world.peers)
    world.instance("a")
    world.model("m")
    trailers = ((b"grpc-status", b"8"), (b"grpc-retry-pushback-ms", b"70"))
    script.answers["a:1"] = [RpcError(Code.RESOURCE_EXHAUSTED, "busy", trailers)]
    with pytest.raises(MeshError, match="busy") as caught:
        await gateway.call(PATH, "m", b"")
    assert caught.value.code is Code.RESOURCE_EXHAUSTED
    assert caught.value.retry_after_ms == 70
    assert gateway.inflight == 0


async def test_calls_and_bytes_are_bounded(world) -> None:
    script = Script(world)
    world.instance("a")
    world.model("m")
    world.copy("m", "a")
    script.gate.clear()
    gateway = Gateway(world.dispatcher, world.peers, max_calls=2, max_held_bytes=10)
    first = asyncio.create_task(gateway.call(PATH, "m", b"12345678"))
    await world.until(lambda: script.asked)
    with pytest.raises(ResourceExhausted, match="8 bytes"):
        await gateway.call(PATH, "m", b"123")
    second = asyncio.create_task(gateway.call(PATH, "m", b"1"))
    await world.until(lambda: len(script.asked) == 2)
    with pytest.raises(ResourceExhausted, match="2 requests"):
        await gateway.call(PATH, "m", b"")
    script.gate.set()
    await asyncio.gather(first, second)
    assert (await gateway.call(PATH, "m", b"1234567890")).message == b"ok"


async def test_the_deadline_and_cancelling_end_the_call(world) -> None:
    script = Script(world)
    gateway = Gateway(world.dispatcher, world.peers)
    world.instance("a")
    world.model("m")
    world.copy("m", "a")
    script.gate.clear()
    with pytest.raises(DeadlineExceeded, match=r"0\.01 s"):
        await gateway.call(PATH, "m", b"", timeout_s=0.01)
    task = asyncio.create_task(gateway.call(PATH, "m", b""))
    await world.until(lambda: len(script.asked) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert world.dispatcher.inflight_on("m", "a") == 0
    assert world.dispatcher.inflight == 0
    assert world.metrics.value("api_request", "other", "CANCELLED") == 1
