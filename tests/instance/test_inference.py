"""Inference over real sockets, asked by grpcio: names, refusals, bounds, deadlines, streams."""

from __future__ import annotations

import asyncio
import threading
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import orjson
import pytest

from mesh.instance.servable import INLINE_BYTES_MAX
from protos import mesh_internal_pb2, oip_pb2
from tests.instance.fakes import MIB, WAIT_S, running, until, with_policy

SERVICE = "/inference.GRPCInferenceService/"


def request(name: str = "", values: int = 3, **fields: object) -> bytes:
    data = np.arange(values, dtype=np.float32)
    message = oip_pb2.ModelInferRequest(model_name=name, **fields)
    message.inputs.add(name="x", datatype="FP32", shape=[values])
    message.raw_input_contents.append(data.tobytes())
    return message.SerializeToString()


class Client:
    def __init__(self, address: str) -> None:
        options = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]
        self.channel = grpc.aio.insecure_channel(address, options=options)

    def call(self, path: str, message: bytes, timeout: float = WAIT_S, **metadata: str):
        headers = [(name.replace("_", "-"), value) for name, value in metadata.items()]
        return self.channel.unary_unary(path)(message, metadata=headers, timeout=timeout)

    async def infer(self, message: bytes, timeout: float = WAIT_S, **metadata: str):
        raw = await self.call(SERVICE + "ModelInfer", message, timeout, **metadata)
        return oip_pb2.ModelInferResponse.FromString(raw)

    async def ask(self, method: str, message, reply, **metadata: str):
        path = method if "/" in method else SERVICE + method
        raw = await self.call(path, message.SerializeToString(), **metadata)
        return reply.FromString(raw)


@asynccontextmanager
async def serving(tmp_path: Path, *models: str, **settings: object):
    async with running(tmp_path, **settings) as rig:
        for name in models:
            rig.register(name)
            await rig.load(name)
        client = Client(rig.instance.address)
        try:
            yield rig, client
        finally:
            rig.runtime.open_all()
            await client.channel.close()


def trailer(error: grpc.aio.AioRpcError, name: str = "mesh-error") -> str | None:
    return dict(error.trailing_metadata()).get(name)


async def test_a_model_is_found_by_header_or_by_the_name_in_the_body(tmp_path: Path) -> None:
    async with serving(tmp_path, "m") as (_, client):
        by_body = await client.infer(request("m", id="7"))
        assert (by_body.model_name, by_body.id) == ("m", "7")
        values = np.frombuffer(by_body.raw_output_contents[0], dtype=np.float32)
        assert values.tolist() == [0, 2, 4]
        by_header = await client.infer(request("other"), mm_model_id="m")
        assert by_header.model_name == "other"


@pytest.mark.parametrize(
    ("body", "metadata", "expected"),
    [
        ("alias", {"mm_model_id": "m", "mm_vmodel_id": "v"}, "alias"),
        ("", {"mm_model_id": "m", "mm_vmodel_id": "v"}, "v"),
        ("", {"mm_model_id": "m"}, "m"),
    ],
)
async def test_a_reply_carries_the_name_that_the_client_used(
    tmp_path: Path, body: str, metadata: dict[str, str], expected: str
) -> None:
    async with serving(tmp_path, "m") as (_, client):
        for _ in range(3):  # in a thread first, then inline
            assert (await client.infer(request(body), **metadata)).model_name == expected


@pytest.mark.parametrize("metadata", [{}, {"mm_model_id": "gone"}])
async def test_a_model_that_is_not_loaded_is_not_here(
    tmp_path: Path, metadata: dict[str, str]
) -> None:
    async with serving(tmp_path) as (_, client):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(request("gone"), **metadata)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        assert trailer(caught.value) == "not-here"
        assert "gone" in caught.value.details()


async def test_wrong_input_is_invalid_and_the_models_own_error_is_internal(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, "m") as (rig, client):
        wrong = oip_pb2.ModelInferRequest(model_name="m")
        wrong.inputs.add(name="nope", datatype="FP32", shape=[1])
        wrong.raw_input_contents.append(b"\0\0\0\0")
        for message in (wrong.SerializeToString(), b"\xff\xff"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.infer(message, mm_model_id="m")
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
            assert trailer(caught.value) is None
        rig.runtime.infer_faults["m"] = [ValueError("boom")]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(request("m"))
        assert caught.value.code() is grpc.StatusCode.INTERNAL
        assert "boom" in caught.value.details()
        assert (await client.infer(request("m"))).model_name == "m"


async def test_a_second_model_name_in_the_body_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, "m") as (_, client):
        twice = request("m") + oip_pb2.ModelInferRequest(model_name="n").SerializeToString()
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(twice)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "two models" in caught.value.details()


PEEKED = {"mm_model_id": "m", "mesh_peeked_name": "alias"}
SECOND_NAME = oip_pb2.ModelInferRequest(model_name="n").SerializeToString()


async def test_a_second_name_that_the_router_did_not_see_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, "m", "n") as (_, client):
        assert (await client.infer(request("alias"), **PEEKED)).model_name == "alias"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(request("alias") + SECOND_NAME, **PEEKED)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "'alias' and then 'n'" in caught.value.details()
        # The router saw the whole message: protobuf's last name was the one it routed by.
        assert (await client.infer(request("x") + SECOND_NAME, mm_model_id="n")).model_name == "n"


async def test_a_second_name_in_a_metadata_request_is_refused(tmp_path: Path) -> None:
    async with serving(tmp_path, "m") as (_, client):
        for name, code in (("alias", None), ("n", grpc.StatusCode.INVALID_ARGUMENT)):
            asked = client.ask(
                "ModelMetadata",
                oip_pb2.ModelMetadataRequest(name=name),
                oip_pb2.ModelMetadataResponse,
                **PEEKED,
            )
            if code is None:
                assert (await asked).name == name
                continue
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await asked
            assert caught.value.code() is code
            assert "two models" in caught.value.details()


async def test_a_quick_model_runs_in_the_event_loop_and_a_new_one_in_a_thread(
    tmp_path: Path,
) -> None:
    generous = with_policy(inline_max_us=50_000, inline_turn_max_us=100_000)
    async with serving(tmp_path, "m", policy=generous) as (rig, client):
        for _ in range(4):
            await client.infer(request("m"))
        threads = [thread for _, thread in rig.runtime.calls]
        assert threads[0].startswith("infer-")
        assert threads[1:] == ["MainThread"] * 3


async def test_a_slow_model_stays_in_threads(tmp_path: Path) -> None:
    async with serving(tmp_path, "m", policy=with_policy(inline_max_us=0)) as (rig, client):
        for _ in range(3):
            await client.infer(request("m"))
        assert all(thread.startswith("infer-") for _, thread in rig.runtime.calls)


async def test_what_exceeds_this_turn_of_the_loop_is_answered_in_the_next(
    tmp_path: Path,
) -> None:
    narrow = with_policy(inline_max_us=50_000, inline_turn_max_us=50_000)
    async with serving(tmp_path, "m", policy=narrow) as (rig, client):
        await client.infer(request("m"))
        rig.pod.servables["m"].estimates[:] = [40_000_000] * len(rig.pod.servables["m"].estimates)
        replies = await asyncio.gather(*(client.infer(request("m")) for _ in range(50)))
        assert len(replies) == 50
        assert rig.instance.executor.busy == 0
        assert rig.pod.servables["m"].use.in_flight == 0


async def test_a_large_message_never_runs_in_the_loop(tmp_path: Path) -> None:
    generous = with_policy(inline_max_us=1_000_000, inline_turn_max_us=1_000_000)
    async with serving(tmp_path, "m", policy=generous) as (rig, client):
        values = INLINE_BYTES_MAX // 4 + 1
        for _ in range(2):
            reply = await client.infer(request("m", values))
            got = np.frombuffer(reply.raw_output_contents[0], dtype=np.float32)
            assert np.array_equal(got, np.arange(values, dtype=np.float32) * 2)
        assert all(thread.startswith("infer-") for _, thread in rig.runtime.calls)


async def test_a_copys_concurrency_and_queue_are_bounded(tmp_path: Path) -> None:
    bounded = with_policy(default_max_concurrency=2, max_queued_per_copy=3)
    async with serving(tmp_path, "m", policy=bounded) as (rig, client):
        rig.runtime.infer_gates["m"] = threading.Event()
        calls = [client.call(SERVICE + "ModelInfer", request("m")) for _ in range(5)]
        await until(lambda: rig.instance.executor.busy == 5)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(request("m"))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert trailer(caught.value) == "overloaded"
        await until(lambda: rig.runtime.inside["m"] == 2)  # its threads take their time
        rig.runtime.infer_gates["m"].set()
        await asyncio.gather(*calls)
        assert rig.runtime.most_inside["m"] == 2
        assert rig.pod.servables["m"].use.in_flight == 0


async def test_a_slow_model_does_not_keep_all_threads_from_the_others(tmp_path: Path) -> None:
    async with serving(tmp_path, "slow", "quick", inference_threads=2) as (rig, client):
        rig.runtime.infer_gates["slow"] = threading.Event()
        calls = [client.call(SERVICE + "ModelInfer", request("slow")) for _ in range(8)]
        await until(lambda: rig.instance.executor.busy == 8)
        assert (await client.infer(request("quick"))).model_name == "quick"
        rig.runtime.infer_gates["slow"].set()
        await asyncio.gather(*calls)


async def test_a_request_whose_deadline_passes_in_the_queue_never_runs(tmp_path: Path) -> None:
    bounded = with_policy(default_max_concurrency=1)
    async with serving(tmp_path, "m", policy=bounded) as (rig, client):
        rig.runtime.infer_gates["m"] = threading.Event()
        first = client.call(SERVICE + "ModelInfer", request("m"))
        await until(lambda: rig.runtime.inside.get("m"))
        for patience_s in (0.1, 1.0, 10.0):  # the first that it comes to the queue in
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.infer(request("m"), timeout=patience_s)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if rig.instance.executor.queued:
                break
        cancelled = client.call(SERVICE + "ModelInfer", request("m"))
        await until(lambda: rig.instance.executor.queued == 2)
        cancelled.cancel()
        await until(lambda: rig.instance.server.inflight == 1)
        rig.runtime.infer_gates["m"].set()
        await first
        await until(lambda: rig.instance.executor.busy == 0)
        assert len(rig.runtime.calls) == 1
        assert rig.pod.servables["m"].use.in_flight == 0


async def test_a_copy_is_unloaded_only_after_its_requests_and_takes_no_new_ones(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, "m") as (rig, client):
        rig.runtime.infer_gates["m"] = threading.Event()
        inside = client.call(SERVICE + "ModelInfer", request("m"))
        await until(lambda: rig.runtime.inside.get("m"))
        rig.unregister("m")
        await until(lambda: "m" not in rig.pod.servables)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(request("m"))
        assert trailer(caught.value) == "not-here"
        assert rig.runtime.unloaded == []
        rig.runtime.infer_gates["m"].set()
        assert oip_pb2.ModelInferResponse.FromString(await inside).model_name == "m"
        await until(lambda: rig.runtime.unloaded == ["m"])


async def test_a_draining_instance_refuses_new_requests_and_finishes_its_own(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, "m") as (rig, client):
        rig.runtime.infer_gates["m"] = threading.Event()
        inside = client.call(SERVICE + "ModelInfer", request("m"))
        await until(lambda: rig.runtime.inside.get("m"))
        rig.instance.inference.draining = True
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await client.infer(request("m"), mm_model_id="m")
        assert trailer(caught.value) == "draining"
        drain = asyncio.create_task(rig.instance.drain())
        await until(lambda: rig.instance.server.draining)
        rig.runtime.infer_gates["m"].set()
        assert oip_pb2.ModelInferResponse.FromString(await inside).model_name == "m"
        await drain
        assert rig.server.keys("copies/") == []


async def stream_of(client: Client, messages: list[bytes], **metadata: str):
    headers = [(name.replace("_", "-"), value) for name, value in metadata.items()]
    call = client.channel.stream_stream(SERVICE + "ModelStreamInfer")(
        iter(messages), metadata=headers, timeout=WAIT_S
    )
    return [oip_pb2.ModelStreamInferResponse.FromString(raw) async for raw in call]


async def test_a_stream_answers_each_message_in_order_and_survives_a_bad_one(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path, "m") as (_, client):
        bad = oip_pb2.ModelInferRequest(model_name="m", id="bad").SerializeToString()
        messages = [request("m", id=str(n)) for n in range(5)]
        replies = await stream_of(client, [*messages[:2], bad, *messages[2:]])
        assert [bool(r.error_message) for r in replies] == [0, 0, 1, 0, 0, 0]
        assert [r.infer_response.id for r in replies if not r.error_message] == list("01234")


async def test_a_stream_belongs_to_one_model(tmp_path: Path) -> None:
    async with serving(tmp_path, "m", "n") as (_, client):
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream_of(client, [request("m"), request("n")])
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        for messages, metadata in (
            ([request("alias"), request("n")], {"mm_model_id": "m"}),
            ([request("alias") + SECOND_NAME], PEEKED),
            ([request("n")], PEEKED),
            ([request("alias"), request("alias") + SECOND_NAME], {"mm_model_id": "m"}),
        ):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await stream_of(client, messages, **metadata)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        replies = await stream_of(client, [request("alias"), request("alias")], **PEEKED)
        assert [r.infer_response.model_name for r in replies] == ["alias", "alias"]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stream_of(client, [request("gone")])
        assert trailer(caught.value) == "not-here"


async def test_what_the_server_tells_of_itself_and_of_its_models(tmp_path: Path) -> None:
    async with serving(tmp_path, "m") as (_, client):
        live = await client.ask(
            "ServerLive", oip_pb2.ServerLiveRequest(), oip_pb2.ServerLiveResponse
        )
        ready = await client.ask(
            "ServerReady", oip_pb2.ServerReadyRequest(), oip_pb2.ServerReadyResponse
        )
        assert live.live and ready.ready
        server = await client.ask(
            "ServerMetadata", oip_pb2.ServerMetadataRequest(), oip_pb2.ServerMetadataResponse
        )
        assert server.name == "modelmesh-py"
        for name, expected in (("m", True), ("gone", False)):
            model = await client.ask(
                "ModelReady", oip_pb2.ModelReadyRequest(name=name), oip_pb2.ModelReadyResponse
            )
            assert model.ready is expected
        metadata = await client.ask(
            "ModelMetadata",
            oip_pb2.ModelMetadataRequest(name="alias"),
            oip_pb2.ModelMetadataResponse,
            mm_model_id="m",
        )
        assert (metadata.name, metadata.inputs[0].name) == ("alias", "x")
        config = await client.ask(
            "ModelConfig", oip_pb2.ModelConfigRequest(name="m"), oip_pb2.ModelConfigResponse
        )
        assert config.config.input[0].data_type == oip_pb2.TYPE_FP32
        assert config.config.max_batch_size == 0


async def test_statistics_count_what_was_served(tmp_path: Path) -> None:
    async with serving(tmp_path, "m", "n") as (_, client):
        for _ in range(3):
            await client.infer(request("m"))
        with pytest.raises(grpc.aio.AioRpcError):
            await client.infer(b"\xff\xff", mm_model_id="m")
        reply = await client.ask(
            "ModelStatistics", oip_pb2.ModelStatisticsRequest(), oip_pb2.ModelStatisticsResponse
        )
        stats = {s.name: s for s in reply.model_stats}
        assert set(stats) == {"m", "n"}
        assert stats["m"].inference_stats.success.count == 3
        assert (stats["m"].inference_count, stats["m"].execution_count) == (9, 3)  # rows, runs
        assert stats["m"].inference_stats.success.ns > 0
        assert stats["m"].inference_stats.compute_infer.ns > 0
        assert stats["m"].inference_stats.fail.count == 1
        assert stats["m"].last_inference > 0
        assert stats["n"].inference_count == 0


async def test_rest_bodies_are_answered_as_they_were_asked(tmp_path: Path) -> None:
    async with serving(tmp_path, "m") as (_, client):
        path = "/mesh.internal.v1.Instance/Rest"
        names = {"mm_model_id": "m", "mesh_client_model_name": "al%20ias"}
        v2 = {"inputs": [{"name": "x", "datatype": "FP32", "shape": [2], "data": [1, 2]}]}
        call = client.call(path, orjson.dumps(v2), mesh_rest_kind="v2-infer", **names)
        reply = orjson.loads(await call)
        assert reply["model_name"] == "al ias"
        assert reply["outputs"][0]["data"] == [2, 4]
        initial = dict(await call.initial_metadata())
        assert initial["mesh-http-content-type"] == "application/json"
        v1 = await client.call(path, b'{"instances": [1, 2]}', mesh_rest_kind="v1-predict", **names)
        assert orjson.loads(v1) == {"predictions": [2, 4]}
        for kind, body in (("v2-infer", b"{"), ("v9", b"{}")):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await client.call(path, body, mesh_rest_kind=kind, **names)
            assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT


async def test_routers_load_describe_and_unload(tmp_path: Path) -> None:
    async with serving(tmp_path) as (rig, client):
        rig.register("m")
        internal = "/mesh.internal.v1.Instance/"
        loaded = await client.ask(
            internal + "Load",
            mesh_internal_pb2.LoadRequest(model_id="m", revision=rig.server.revision),
            mesh_internal_pb2.LoadResponse,
        )
        assert loaded.outcome == mesh_internal_pb2.LoadResponse.LOADED
        assert loaded.size_bytes == MIB
        await client.infer(request("m"))
        described = await client.ask(
            internal + "Describe",
            mesh_internal_pb2.DescribeRequest(model_id="m"),
            mesh_internal_pb2.DescribeResponse,
        )
        document = orjson.loads(described.json)
        assert (document["state"], document["requests"]) == ("LOADED", 1)
        unloaded = await client.ask(
            internal + "Unload",
            mesh_internal_pb2.UnloadRequest(model_id="m"),
            mesh_internal_pb2.UnloadResponse,
        )
        assert unloaded.was_here
        failed = await client.ask(
            internal + "Load",
            mesh_internal_pb2.LoadRequest(model_id="nobody"),
            mesh_internal_pb2.LoadResponse,
        )
        assert failed.outcome == mesh_internal_pb2.LoadResponse.FAILED
        assert failed.code == 5


async def test_hits_during_a_storm_of_evictions_are_answered_or_not_here(
    tmp_path: Path,
) -> None:
    """No other error, and what is answered is right, while copies come and go."""
    async with serving(tmp_path, capacity_bytes=4 * MIB) as (rig, client):
        names = [f"m{n}" for n in range(10)]
        for name in names:
            rig.register(name)
        answered = 0
        stop = asyncio.Event()

        async def ask(name: str) -> None:
            nonlocal answered
            while not stop.is_set():
                try:
                    reply = await client.infer(request(name))
                except grpc.aio.AioRpcError as error:
                    assert trailer(error) == "not-here", error
                    await asyncio.sleep(0)
                    continue
                assert reply.model_name == name
                answered += 1

        askers = [asyncio.create_task(ask(name)) for name in names]
        for _ in range(4):
            for name in names:
                await rig.load(name)
        stop.set()
        await asyncio.gather(*askers)
        assert answered > 0
        assert rig.runtime.most_held_bytes <= 4 * MIB
