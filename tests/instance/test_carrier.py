"""Models in other processes: what clients send arrives there, and what is said there comes back.

The other process is a real server on a Unix socket; the instance around is the whole one.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from mesh.core.errors import Code, InvalidArgument, MeshError, Unimplemented
from mesh.instance.answers import LoadOutcome
from mesh.runtimes.api import ModelLost, ModelMetadata, ModelSpec
from mesh.wire.client import Channel, ClientStream, RpcError
from mesh.wire.server import Server, ServerCall, StreamCall, Streaming, Unary
from protos import oip_pb2

from .fakes import MIB, WAIT_S, Rig, until

INFER = "/inference.GRPCInferenceService/ModelInfer"
METADATA = "/inference.GRPCInferenceService/ModelMetadata"
OWN = "/own.Service/Method"


class Elsewhere:
    """The other process: answers what it was sent, or does what its ``script`` says."""

    def __init__(self) -> None:
        self.calls: list[ServerCall] = []
        self.messages: list[bytes] = []
        self.held = False  # keeps calls without an answer
        self.takes = 1_000  # messages of a stream, then it ends
        self.fails: list[tuple[MeshError, tuple[tuple[str, str], ...]]] = []

    def infer(self, call: ServerCall, message: bytes) -> None:
        self.calls.append(call)
        self.messages.append(message)
        if self.fails:
            error, trailers = self.fails.pop(0)
            call.fail(error, trailers=trailers)
        elif not self.held:
            call.reply(message, initial=(("x-said", "yes"),))

    async def own(self, call: StreamCall) -> None:
        async for message in call:
            await call.send(b"got " + message)
            self.takes -= 1
            if not self.takes:
                return
        if self.fails:
            raise self.fails.pop(0)[0]

    def release(self) -> None:
        self.held = False
        for call in self.calls:
            call.reply(b"late")


class RemoteFake:
    """A RemoteModel whose process calls the model ``inner``."""

    internal = False
    metadata: ModelMetadata | None = None
    size_bytes = MIB

    def __init__(self, channel: Channel, max_concurrency: int = 0) -> None:
        self.channel = channel
        self.max_concurrency = max_concurrency
        self.unloaded = False

    def admit(self, path: str) -> MeshError | None:
        return Unimplemented("Method not found or not permitted") if "Forbidden" in path else None

    def request(self, path: str, message: bytes) -> bytes:
        if message == b"nonsense":
            raise InvalidArgument("that cannot be passed on")
        return b"inner:" + message

    def reply(self, path: str, message: bytes, client_name: str) -> bytes:
        return client_name.encode() + b"|" + message

    def error(self, path: str, error: RpcError) -> MeshError:
        return ModelLost("it is gone there") if error.code is Code.NOT_FOUND else error

    def unload(self) -> None:
        self.unloaded = True


@asynccontextmanager
async def carried(tmp_path: Path, *, max_concurrency: int = 0, **settings: object):
    """(rig, what is elsewhere, the model, a channel to the instance) with model ``m`` loaded."""
    elsewhere = Elsewhere()
    methods = {INFER: Unary(elsewhere.infer), METADATA: Unary(elsewhere.infer),
               OWN: Streaming(elsewhere.own)}  # fmt: skip
    server = Server(methods)
    socket = str(tmp_path / "s")
    await server.start_unix(socket)
    there = Channel(f"unix:{socket}")
    model = RemoteFake(there, max_concurrency)
    rig = Rig(tmp_path, **settings)

    def load(spec: ModelSpec) -> RemoteFake:
        return model

    rig.runtime.load = load  # type: ignore[method-assign,assignment]
    await rig.start()
    rig.register("m")
    assert (await rig.load("m")).outcome is LoadOutcome.LOADED
    here = Channel(rig.instance.address)
    try:
        yield rig, elsewhere, model, here
    finally:
        await here.close()
        await rig.instance.close()
        await there.close()
        await server.close()


def header(model_id: str = "m", **more: str) -> list[tuple[str, str]]:
    return [("mm-model-id", model_id), *((k.replace("_", "-"), v) for k, v in more.items())]


async def test_a_request_goes_there_as_the_model_wants_it_and_the_answer_comes_back(
    tmp_path: Path,
) -> None:
    async with carried(tmp_path) as (rig, elsewhere, _, here):
        message = oip_pb2.ModelInferRequest(model_name="alias").SerializeToString()
        reply = await here.unary(INFER, message, metadata=header(), timeout_s=WAIT_S)
        assert elsewhere.messages == [b"inner:" + message]
        assert reply.message == b"alias|inner:" + message
        assert (b"x-said", b"yes") in reply.initial
        assert rig.pod.servables["m"].statistics.success_count == 1


async def test_the_clients_metadata_and_the_models_id_go_along_and_nothing_of_the_mesh(
    tmp_path: Path,
) -> None:
    async with carried(tmp_path) as (_, elsewhere, _, here):
        metadata = header(mm_vmodel_id="alias", x_mine="1", mesh_peeked_name="z")
        reply = await here.unary(INFER, b"", metadata=metadata, timeout_s=WAIT_S)
        fields = dict(elsewhere.calls[0].head.fields)
        assert fields[b"mm-model-id"] == b"m" and fields[b"x-mine"] == b"1"
        assert not {b"mm-vmodel-id", b"mesh-peeked-name"} & fields.keys()
        assert b"grpc-timeout" in fields
        assert reply.message.startswith(b"alias|")


async def test_a_method_that_this_server_does_not_know_is_streamed_there(tmp_path: Path) -> None:
    async with carried(tmp_path) as (_, _, _, here):
        stream = here.stream(OWN, metadata=header(), timeout_s=WAIT_S)
        await stream.send(b"1")
        await stream.send(b"2")
        await stream.half_close()
        assert [message async for message in stream] == [b"m|got inner:1", b"m|got inner:2"]


@pytest.mark.parametrize("before", [(), (b"1",)], ids=["at once", "later"])
async def test_a_message_that_cannot_be_passed_on_ends_its_stream(
    tmp_path: Path, before: tuple[bytes, ...]
) -> None:
    async with carried(tmp_path) as (rig, _, _, here):
        stream = here.stream(OWN, metadata=header(), timeout_s=WAIT_S)
        for message in (*before, b"nonsense"):  # and no half-close: the process waits for more
            await stream.send(message)
        with pytest.raises(RpcError, match="cannot be passed on") as caught:
            _ = [message async for message in stream]
        assert caught.value.code is Code.INVALID_ARGUMENT
        assert rig.pod.servables["m"].statistics.fail_count == 1
        assert rig.pod.servables["m"].use.in_flight == 0


async def test_a_process_that_ends_a_stream_well_before_the_client_does_has_ended_it_well(
    tmp_path: Path,
) -> None:
    async with carried(tmp_path) as (_, elsewhere, _, here):
        elsewhere.takes = 1
        stream = here.stream(OWN, metadata=header(), timeout_s=WAIT_S)
        await stream.send(b"1")
        assert [message async for message in stream] == [b"m|got inner:1"]


async def test_what_a_process_says_of_an_error_reaches_the_client(tmp_path: Path) -> None:
    async with carried(tmp_path) as (rig, elsewhere, _, here):
        said = MeshError("no such input", code=Code.OUT_OF_RANGE)
        elsewhere.fails = [(said, (("x-detail", "7"), ("mesh-error", "not-here")))]
        with pytest.raises(RpcError, match="no such input") as caught:
            await here.unary(INFER, b"", metadata=header(), timeout_s=WAIT_S)
        assert caught.value.code is Code.OUT_OF_RANGE
        assert (b"x-detail", b"7") in caught.value.trailers
        assert b"mesh-error" not in dict(caught.value.trailers)  # it is no instance of ours
        assert rig.pod.servables["m"].statistics.fail_count == 1
        elsewhere.fails = [(said, ())]
        stream = here.stream(OWN, metadata=header(), timeout_s=WAIT_S)
        await stream.half_close()
        with pytest.raises(RpcError, match="no such input"):
            _ = [message async for message in stream]


async def test_a_model_that_its_process_has_lost_is_dropped_and_asked_for_elsewhere(
    tmp_path: Path,
) -> None:
    async with carried(tmp_path) as (rig, elsewhere, model, here):
        elsewhere.fails = [(MeshError("who?", code=Code.NOT_FOUND), ())]
        with pytest.raises(RpcError) as caught:
            await here.unary(INFER, b"", metadata=header(), timeout_s=WAIT_S)
        assert (b"mesh-error", b"not-here") in caught.value.trailers
        await until(lambda: model.unloaded)
        assert "m" not in rig.pod.servables


async def test_a_forbidden_method_is_refused_here(tmp_path: Path) -> None:
    async with carried(tmp_path) as (_, elsewhere, _, here):
        stream = here.stream("/own.Service/Forbidden", metadata=header(), timeout_s=WAIT_S)
        await stream.half_close()
        with pytest.raises(RpcError, match="not permitted") as caught:
            _ = [message async for message in stream]
        assert caught.value.code is Code.UNIMPLEMENTED
        assert not elsewhere.messages


async def test_a_cancelled_request_is_cancelled_there_and_frees_its_place(tmp_path: Path) -> None:
    async with carried(tmp_path) as (rig, elsewhere, _, here):
        elsewhere.held = True
        asking = asyncio.create_task(here.unary(INFER, b"", metadata=header(), timeout_s=WAIT_S))
        await until(lambda: elsewhere.calls)
        asking.cancel()
        await until(lambda: elsewhere.calls[0].cancelled)
        await until(lambda: rig.pod.servables["m"].use.in_flight == 0)
        assert rig.instance.carrier.busy == 0


async def test_no_more_than_its_process_takes_are_there_at_once_and_the_rest_wait_or_are_refused(
    tmp_path: Path,
) -> None:
    policy = replace(Rig(tmp_path / "unused").policy, max_queued_per_copy=1)
    async with carried(tmp_path, max_concurrency=2, policy=policy) as (rig, elsewhere, _, here):
        elsewhere.held = True
        asking = [
            asyncio.create_task(here.unary(INFER, b"", metadata=header(), timeout_s=WAIT_S))
            for _ in range(3)
        ]
        await until(lambda: rig.instance.carrier.queued == 1)
        with pytest.raises(RpcError) as caught:
            await here.unary(INFER, b"", metadata=header(), timeout_s=WAIT_S)
        assert caught.value.code is Code.RESOURCE_EXHAUSTED
        assert (b"mesh-error", b"overloaded") in caught.value.trailers
        await until(lambda: len(elsewhere.calls) == 2)
        elsewhere.release()
        answers = await asyncio.gather(*asking)
        assert sorted(one.message[:6] for one in answers) == [b"m|inne", b"m|late", b"m|late"]
        assert rig.pod.servables["m"].use.in_flight == 0


async def test_a_stream_is_one_of_those_that_its_process_takes_at_once(tmp_path: Path) -> None:
    policy = replace(Rig(tmp_path / "unused").policy, max_queued_per_copy=2)
    async with carried(tmp_path, max_concurrency=1, policy=policy) as (rig, elsewhere, _, here):
        carrier = rig.instance.carrier

        async def stream(message: bytes) -> tuple[ClientStream, AsyncIterator[bytes]]:
            call = here.stream(OWN, metadata=header(), timeout_s=WAIT_S)
            await call.send(message)
            return call, aiter(call)

        first, answers = await stream(b"1")
        assert await anext(answers) == b"m|got inner:1"
        given_up, _ = await stream(b"given up")
        await until(lambda: carrier.queued == 1)
        given_up.cancel()
        await until(lambda: carrier.queued == 0)
        second, more = await stream(b"2")
        await until(lambda: carrier.queued == 1)
        unary = asyncio.create_task(here.unary(INFER, b"", metadata=header(), timeout_s=WAIT_S))
        await until(lambda: carrier.queued == 2)
        with pytest.raises(RpcError) as caught:
            await anext((await stream(b"too much"))[1])
        assert caught.value.code is Code.RESOURCE_EXHAUSTED
        assert (b"mesh-error", b"overloaded") in caught.value.trailers
        assert (carrier.running, elsewhere.messages) == (1, [])

        await first.half_close()
        assert [message async for message in answers] == []
        assert await anext(more) == b"m|got inner:2"
        assert (carrier.running, carrier.queued) == (1, 1)
        await second.half_close()
        assert (await unary).message == b"m|inner:"
        await until(lambda: carrier.busy == 0)
        assert rig.pod.servables["m"].running == rig.pod.servables["m"].use.in_flight == 0


async def test_a_process_that_is_gone_is_an_error_and_no_end_of_the_pod(tmp_path: Path) -> None:
    async with carried(tmp_path) as (rig, _, model, here):
        model.channel = Channel(f"unix:{tmp_path}/nobody")
        with pytest.raises(RpcError) as caught:
            await here.unary(INFER, b"", metadata=header(), timeout_s=WAIT_S)
        assert caught.value.code is Code.UNAVAILABLE
        assert rig.instance.carrier.busy == 0


async def test_its_own_process_tells_what_nobody_else_knows(tmp_path: Path) -> None:
    async with carried(tmp_path) as (_, elsewhere, _, here):
        message = oip_pb2.ModelMetadataRequest(name="m").SerializeToString()
        await here.unary(METADATA, message, metadata=header(), timeout_s=WAIT_S)
        assert elsewhere.messages == [b"inner:" + message]


async def test_a_method_of_its_own_has_only_a_model_in_a_process_of_its_own(
    tmp_path: Path,
) -> None:
    rig = Rig(tmp_path)
    await rig.start()
    rig.register("ordinary")
    await rig.load("ordinary")
    here = Channel(rig.instance.address)
    try:
        for model_id, code in (("ordinary", Code.UNIMPLEMENTED), ("absent", Code.UNAVAILABLE)):
            stream = here.stream(OWN, metadata=header(model_id), timeout_s=WAIT_S)
            await stream.half_close()
            with pytest.raises(RpcError) as caught:
                _ = [message async for message in stream]
            assert caught.value.code is code
    finally:
        await here.close()
        await rig.instance.close()
