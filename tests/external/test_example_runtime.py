"""The example runtime serves behind an instance: its models, its methods, its faults."""

from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from google.protobuf import struct_pb2, wrappers_pb2

from mesh.instance.answers import LoadOutcome
from mesh.runtimes.external_calls import ModelRuntimeClient
from mesh.wire.client import Channel, RpcError
from protos import oip_pb2 as oip
from tests.external.rig import OIP, WAIT_S, answer, request, served
from tests.instance.fakes import until

DESCRIBE = "/example.Affine/Describe"


async def in_runtime(address: str, model_id: str) -> bool:
    client = ModelRuntimeClient(Channel(address))
    try:
        return await client.size_bytes(model_id, WAIT_S) > 0
    except RpcError as error:
        assert error.code.name == "NOT_FOUND"
        return False
    finally:
        await client.close()


async def test_a_model_is_loaded_answers_under_the_clients_name_and_is_unloaded(
    tmp_path: Path,
) -> None:
    async with served(tmp_path) as (pod, runtime):
        pod.write("line-1", weights=[2.0, 3.0], bias=1.0)
        loaded = await pod.load("line-1")
        assert loaded.outcome is LoadOutcome.LOADED, loaded
        assert loaded.size_bytes > 4096
        reply = await pod.infer("line-1", 1.0, 1.0, 10.0, 0.0, alias="line")
        assert answer(reply) == [6.0, 21.0]
        assert (reply.model_name, reply.id) == ("line", "r1")
        assert await in_runtime(runtime.address, "line-1")
        assert await pod.instance.pod.unload("line-1", "test")
        assert not await in_runtime(runtime.address, "line-1")


async def test_a_method_of_the_runtimes_own_gets_the_models_id_put_in(tmp_path: Path) -> None:
    async with served(tmp_path) as (pod, _):
        pod.write("own", weights=[5.0])
        await pod.load("own")
        raw = await pod.call(DESCRIBE, wrappers_pb2.StringValue(value="whatever"), "own")
        described = struct_pb2.Struct.FromString(raw)
        assert (described["id"], list(described["weights"])) == ("own", [5.0])


async def test_rest_reaches_a_runtime_that_speaks_grpc_only(tmp_path: Path) -> None:
    async with served(tmp_path) as (pod, _):
        pod.write("r", weights=[2.0, 3.0], bias=1.0)
        await pod.load("r")
        tensor = {"name": "x", "datatype": "FP64", "shape": [2, 2], "data": [1, 1, 10, 0]}
        answered = await pod.rest("r", "v2-infer", {"id": "7", "inputs": [tensor]}, alias="line")
        (output,) = answered["outputs"]
        assert (answered["model_name"], answered["id"], output["data"]) == ("line", "7", [6, 21])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await pod.rest("r", "v2-infer", {"inputs": "nothing"}, alias="line")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        tensor["shape"], tensor["data"] = [1, 3], [1, 1, 1]
        with pytest.raises(grpc.aio.AioRpcError) as caught:  # as the runtime itself says
            await pod.rest("r", "v2-infer", {"inputs": [tensor]}, alias="line")
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert caught.value.details() == "3 numbers are no rows of 2"


async def test_a_stream_is_carried_both_ways(tmp_path: Path) -> None:
    async with served(tmp_path) as (pod, _):
        pod.write("s", weights=[1.0], bias=1.0)
        await pod.load("s")
        stream = pod.channel.stream_stream(OIP + "ModelStreamInfer")(
            metadata=[("mm-model-id", "s"), ("mm-vmodel-id", "alias")], timeout=WAIT_S
        )
        for value in (1.0, 2.0):
            await stream.write(request("alias", value).SerializeToString())
            reply = oip.ModelStreamInferResponse.FromString(await stream.read()).infer_response
            assert (reply.model_name, answer(reply)) == ("alias", [value + 1.0])
        await stream.done_writing()
        assert await stream.read() is grpc.aio.EOF


@pytest.mark.parametrize(
    "path", ["/example.Affine/Secret", "/mmesh.ModelRuntime/unloadModel", OIP + "ModelMetadata"]
)
async def test_a_method_that_the_runtime_does_not_list_is_refused(
    tmp_path: Path, path: str
) -> None:
    async with served(tmp_path) as (pod, runtime):
        pod.write("m", weights=[1.0])
        await pod.load("m")
        with pytest.raises(grpc.aio.AioRpcError) as refused:
            await pod.call(path, wrappers_pb2.StringValue(value="m"), "m")
        assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert refused.value.details() == "Method not found or not permitted"
        assert await in_runtime(runtime.address, "m")


async def test_a_model_that_the_runtime_refuses_fails_with_its_words(tmp_path: Path) -> None:
    async with served(tmp_path) as (pod, _):
        pod.write("broken", no_weights=True)
        failed = await pod.load("broken")
        assert failed.outcome is LoadOutcome.FAILED
        assert failed.code.name == "FAILED_PRECONDITION"
        assert "is no affine model: KeyError('weights')" in failed.message
        assert pod.instance.pod.cache.used_bytes == 0


async def test_a_load_that_times_out_is_followed_by_an_unload(tmp_path: Path) -> None:
    async with served(tmp_path, loading_timeout_ms=150) as (pod, runtime):
        pod.write("slow", weights=[1.0], load_seconds=600)
        failed = await pod.load("slow")
        assert failed.outcome is LoadOutcome.FAILED
        assert failed.code.name == "UNAVAILABLE"
        assert "Load of model 'slow' timed out after 0.15s" in failed.message
        assert not await in_runtime(runtime.address, "slow")


async def test_what_a_restarted_runtime_has_lost_is_loaded_anew(tmp_path: Path) -> None:
    async with served(tmp_path) as (pod, runtime):
        pod.write("m", weights=[4.0])
        await pod.load("m")
        await runtime.kill()
        await until(lambda: pod.runtimes._data.peer.usable() is None)
        await runtime.start()
        with pytest.raises(grpc.aio.AioRpcError) as lost:
            await pod.infer("m", 1.0)
        assert lost.value.code() is grpc.StatusCode.UNAVAILABLE
        assert "model 'm' is not loaded" in (lost.value.details() or "")
        assert ("mesh-error", "not-here") in [
            tuple(pair) for pair in lost.value.trailing_metadata()
        ]
        await until(lambda: "m" not in pod.instance.pod.servables)
        assert (await pod.again("m")).outcome is LoadOutcome.LOADED
        assert answer(await pod.infer("m", 2.0)) == [8.0]


async def test_while_the_runtime_is_away_requests_are_told_to_go_elsewhere(tmp_path: Path) -> None:
    async with served(tmp_path) as (pod, runtime):
        pod.write("m", weights=[4.0])
        await pod.load("m")
        await pod.infer("m", 1.0)
        await runtime.kill()
        await until(lambda: pod.runtimes._data.peer.usable() is None)
        with pytest.raises(grpc.aio.AioRpcError) as away:
            await pod.infer("m", 1.0)
        assert away.value.code() is grpc.StatusCode.UNAVAILABLE
        assert ("mesh-error", "not-here") in [
            tuple(pair) for pair in away.value.trailing_metadata()
        ]
        await until(lambda: pod.runtimes.pending_unloads == ("m",))
        assert "m" not in pod.instance.pod.servables
        await runtime.start()
        await until(lambda: pod.runtimes.pending_unloads == ())
        assert (await pod.again("m")).outcome is LoadOutcome.LOADED
        assert answer(await pod.infer("m", 2.0)) == [8.0]
