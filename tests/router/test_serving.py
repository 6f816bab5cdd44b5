"""Requests through a real router to real instances, asked by grpcio."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest

from mesh.core.types import InstanceState
from protos import mesh_internal_pb2 as internal
from protos import oip_pb2 as oip
from tests.instance.fakes import until
from tests.router.mesh_rig import OIP, infer_request, mesh


async def test_a_miss_loads_and_answers_and_then_it_is_a_hit(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2) as rig:
        await rig.register("m")
        assert await rig.infer("m", 1.0, 2.5) == [2.0, 5.0]
        assert await rig.infer("m", 3.0) == [6.0]
        assert rig.loads_of("m") == 1


async def test_the_reply_carries_the_name_that_the_client_used(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.apply("iris", "fake://1")
        reply = await rig.call(
            OIP + "ModelInfer", infer_request("iris", 1.0), oip.ModelInferResponse
        )
        assert reply.model_name == "iris"


async def test_many_clients_and_two_routers_cause_one_load(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2, routers=2) as rig:
        await rig.register("m")
        asked = [rig.infer("m", float(at), router=at % 2) for at in range(40)]
        answers = await asyncio.gather(*asked)
        assert answers == [[2.0 * at] for at in range(40)]
        assert rig.loads_of("m") == 1


async def test_the_model_by_header_wins_over_the_body(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        answer = await rig.infer("something else", 1.0, metadata=(("mm-model-id", "m"),))
        assert answer == [2.0]


async def test_a_name_behind_what_the_router_looked_at_is_refused(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        large = infer_request("m", *([1.0] * 100_000)).SerializeToString()
        ask = rig.channels[0].unary_unary(OIP + "ModelInfer")
        assert oip.ModelInferResponse.FromString(await ask(large, timeout=60)).model_name == "m"
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            second = oip.ModelInferRequest(model_name="n").SerializeToString()
            await ask(large + second, timeout=60)
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert "'m' and then 'n'" in caught.value.details()


async def test_an_unknown_model_is_not_found_and_named(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.infer("nobody", 1.0)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        assert "nobody" in caught.value.details()


async def test_a_pod_that_drains_loses_no_request(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2) as rig:
        await rig.register("m")
        await rig.infer("m", 1.0)
        (holder,) = rig.holders("m")
        stop = asyncio.Event()
        answered = 0

        async def ask() -> None:
            nonlocal answered
            while not stop.is_set():
                assert await rig.infer("m", 1.0) == [2.0]
                answered += 1

        clients = [asyncio.create_task(ask()) for _ in range(4)]
        await until(lambda: answered > 20)
        await holder.instance.drain()
        before = answered
        await until(lambda: answered > before + 20)
        stop.set()
        await asyncio.gather(*clients)
        assert rig.loads_of("m") == 2


async def test_a_pod_that_dies_is_replaced_while_clients_wait(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2) as rig:
        await rig.register("m")
        await rig.infer("m", 1.0)
        (holder,) = rig.holders("m")
        await holder.instance.server.close()  # its record and its lease are still there
        assert await rig.infer("m", 4.0) == [8.0]


async def test_while_the_store_is_away_loaded_models_keep_serving(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        await rig.infer("m", 1.0)
        rig.server.go_away()
        assert await rig.infer("m", 2.0) == [4.0]
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.infer("unknown", 1.0)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
        rig.server.come_back()


async def test_a_failed_load_is_told_with_its_cause_and_not_tried_in_a_loop(
    tmp_path: Path,
) -> None:
    from mesh.core.errors import LoadFailed

    async with mesh(tmp_path) as rig:
        await rig.register("m")
        rig.pods[0].runtime.load_faults["m"] = [LoadFailed("the artifact is corrupt")]
        for _ in range(3):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rig.infer("m", 1.0)
            assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
            assert "the artifact is corrupt" in caught.value.details()
        assert rig.loads_of("m") == 1


async def test_metadata_and_statistics_come_from_a_copy(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        metadata = await rig.call(
            OIP + "ModelMetadata", oip.ModelMetadataRequest(name="m"), oip.ModelMetadataResponse
        )
        assert metadata.name == "m"
        assert [tensor.name for tensor in metadata.inputs] == ["x"]
        await rig.call(
            OIP + "ModelStatistics",
            oip.ModelStatisticsRequest(name="m"),
            oip.ModelStatisticsResponse,
        )
        config = await rig.call(
            OIP + "ModelConfig", oip.ModelConfigRequest(name="m"), oip.ModelConfigResponse
        )
        assert config.config.name == "m"


async def test_streams_go_both_ways(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        call = rig.channels[0].stream_stream(OIP + "ModelStreamInfer")()
        for value in (1.0, 2.0):
            await call.write(infer_request("m", value).SerializeToString())
            reply = oip.ModelStreamInferResponse.FromString(await call.read())
            assert not reply.error_message
            assert reply.infer_response.id == "r1"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF


async def test_what_only_routers_may_call_is_out_of_reach(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        await rig.infer("m", 1.0)
        for path in ("/mesh.internal.v1.Instance/Unload", "/mmesh.ModelRuntime/unloadModel"):
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rig.call(
                    path,
                    internal.UnloadRequest(model_id="m"),
                    internal.UnloadResponse,
                    metadata=(("mm-model-id", "m"),),
                )
            assert caught.value.code() is grpc.StatusCode.UNIMPLEMENTED
        assert rig.holders("m")


async def test_a_client_that_gives_up_does_not_cancel_the_load(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        gate = rig.pods[0].source.gates["m"] = asyncio.Event()
        for patience_s in (0.2, 2.0, 20.0):  # the first that the load begins in
            with pytest.raises(grpc.aio.AioRpcError) as caught:
                await rig.infer("m", 1.0, timeout=patience_s)
            assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
            if rig.pods[0].source.fetched:
                break
        assert rig.pods[0].source.fetched == ["m"]
        gate.set()
        await until(lambda: rig.holders("m"))
        await until(lambda: rig.routers[0].loads.waiting == 0)
        assert await rig.infer("m", 1.0) == [2.0]


async def test_draining_finishes_what_is_in_flight(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        gate = rig.pods[0].source.gates["m"] = asyncio.Event()
        asked = asyncio.create_task(rig.infer("m", 1.0))
        await until(lambda: rig.pods[0].source.fetched)
        draining = asyncio.create_task(rig.routers[0].drain())
        await until(lambda: rig.routers[0].server.draining)
        gate.set()
        assert await asked == [2.0]
        await draining


async def test_a_model_that_is_deleted_is_unloaded(tmp_path: Path) -> None:
    from protos import mesh_admin_pb2 as admin
    from tests.router.mesh_rig import ADMIN

    async with mesh(tmp_path) as rig:
        await rig.apply("iris", "fake://1")
        await rig.infer("iris", 1.0)
        reply = await rig.call(
            ADMIN + "Delete", admin.DeleteRequest(name="iris"), admin.DeleteResponse
        )
        assert reply.existed
        await until(lambda: rig.pods[0].runtime.unloaded)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.infer("iris", 1.0)
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_the_state_document_tells_what_the_router_sees(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        router, bound = rig.routers[0], rig.bounds[0]
        await until(lambda: router.election.is_leader)
        async with rig.http.get(f"http://127.0.0.1:{bound.metrics_port}/readyz") as reply:
            assert reply.status == 200
            state = await reply.json()
        assert state["instances"] == 1
        assert state["models"] == 1
        assert state["leader"] == router.router_id
        slot = router.view.instances[rig.pods[0].instance.instance_id]
        assert slot.record.state is InstanceState.READY


async def test_metrics_count_hits_and_misses(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        for _ in range(3):
            await rig.infer("m", 1.0)
        url = f"http://127.0.0.1:{rig.bounds[0].metrics_port}/metrics"
        async with rig.http.get(url) as reply:
            text = await reply.text()
        assert "mesh_hits_total 2.0" in text
        assert "mesh_misses_total 1.0" in text
        assert 'modelmesh_api_request_milliseconds_count{code="OK",method="ModelInfer"} 3.0' in (
            text.replace('{method="ModelInfer",code="OK"}', '{code="OK",method="ModelInfer"}')
        )
