"""OIP's own calls, health and reflection, asked by grpcio."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pb2

from mesh.core.errors import LoadFailed
from mesh.oip.reflection_data import PUBLIC_SERVICES
from protos import health_pb2 as health
from protos import oip_pb2 as oip
from protos import reflection_pb2 as reflection
from tests.router.mesh_rig import OIP, MeshRig, mesh

Serving = health.HealthCheckResponse


async def ready(rig: MeshRig, name: str) -> bool:
    reply = await rig.call(
        OIP + "ModelReady", oip.ModelReadyRequest(name=name), oip.ModelReadyResponse
    )
    return reply.ready


async def index(rig: MeshRig, **fields: bool) -> dict[str, str]:
    reply = await rig.call(
        OIP + "RepositoryIndex", oip.RepositoryIndexRequest(**fields), oip.RepositoryIndexResponse
    )
    return {model.name: model.state for model in reply.models}


async def test_the_server_is_live_ready_and_names_itself(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        live = await rig.call(OIP + "ServerLive", oip.ServerLiveRequest(), oip.ServerLiveResponse)
        assert live.live
        up = await rig.call(OIP + "ServerReady", oip.ServerReadyRequest(), oip.ServerReadyResponse)
        assert up.ready
        metadata = await rig.call(
            OIP + "ServerMetadata", oip.ServerMetadataRequest(), oip.ServerMetadataResponse
        )
        assert metadata.name == "modelmesh-py"
        assert "model_repository" in metadata.extensions


async def test_a_registered_model_is_ready_before_it_is_in_memory(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        assert await ready(rig, "m")
        assert await index(rig) == {"m": "UNAVAILABLE"}
        await rig.infer("m", 1.0)
        assert await index(rig, ready=True) == {"m": "READY"}


async def test_a_model_that_failed_or_has_nowhere_to_go_is_not_ready(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("broken")
        await rig.register("unrunnable")
        router = rig.routers[0]
        rig.pods[0].runtime.load_faults["broken"] = [LoadFailed("corrupt")]
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.infer("broken", 1.0)
        assert not await ready(rig, "broken")
        from dataclasses import replace

        record = router.view.models["unrunnable"]
        router.view.put_model(replace(record, model_type="unheard-of"))
        assert not await ready(rig, "unrunnable")


async def test_an_unknown_model_is_not_found(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await ready(rig, "nobody")
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_load_and_unload(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        await rig.call(
            OIP + "RepositoryModelLoad",
            oip.RepositoryModelLoadRequest(model_name="m"),
            oip.RepositoryModelLoadResponse,
        )
        assert rig.holders("m")
        await rig.call(
            OIP + "RepositoryModelUnload",
            oip.RepositoryModelUnloadRequest(model_name="m"),
            oip.RepositoryModelUnloadResponse,
        )
        assert not rig.holders("m")
        assert await rig.infer("m", 1.0) == [2.0]


# ---- health ------------------------------------------------------------------------------------


async def test_check_answers_for_every_service(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        for service in ("", *PUBLIC_SERVICES):
            reply = await rig.call(
                "/grpc.health.v1.Health/Check", health.HealthCheckRequest(service=service), Serving
            )
            assert reply.status == Serving.SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await rig.call(
                "/grpc.health.v1.Health/Check", health.HealthCheckRequest(service="no"), Serving
            )
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_watch_tells_of_changes(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        watch = rig.channels[0].unary_stream("/grpc.health.v1.Health/Watch")
        call = watch(health.HealthCheckRequest().SerializeToString())
        async with asyncio.timeout(60):
            assert Serving.FromString(await call.read()).status == Serving.SERVING
            rig.routers[0].readiness.set_draining()
            assert Serving.FromString(await call.read()).status == Serving.NOT_SERVING
            assert await call.code() is grpc.StatusCode.UNAVAILABLE  # the drain need not wait


async def test_watch_of_an_unknown_service_stays_open(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        watch = rig.channels[0].unary_stream("/grpc.health.v1.Health/Watch")
        call = watch(health.HealthCheckRequest(service="no").SerializeToString())
        async with asyncio.timeout(60):
            assert Serving.FromString(await call.read()).status == Serving.SERVICE_UNKNOWN
        assert not call.done()
        call.cancel()


# ---- reflection --------------------------------------------------------------------------------


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
async def test_reflection(tmp_path: Path, version: str) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        path = f"/grpc.reflection.{version}.ServerReflection/ServerReflectionInfo"
        call = rig.channels[0].stream_stream(path)()
        ask = reflection.ServerReflectionRequest
        await call.write(ask(list_services="").SerializeToString())
        answer = reflection.ServerReflectionResponse.FromString(await call.read())
        names = [service.name for service in answer.list_services_response.service]
        assert "inference.GRPCInferenceService" in names
        symbol = ask(file_containing_symbol="inference.GRPCInferenceService")
        await call.write(symbol.SerializeToString())
        answer = reflection.ServerReflectionResponse.FromString(await call.read())
        (raw,) = answer.file_descriptor_response.file_descriptor_proto
        assert descriptor_pb2.FileDescriptorProto.FromString(raw).package == "inference"
        await call.done_writing()
        assert await call.read() is grpc.aio.EOF
