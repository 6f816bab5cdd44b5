"""ModelMesh's management service: the table of its semantics, through grpcio."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import grpc
import pytest

from mesh import registry
from mesh.core.errors import LoadFailed
from protos import mmesh_pb2 as mm
from tests.instance.fakes import until
from tests.router.mesh_rig import MM, MeshRig, mesh

Status = mm.ModelStatusInfo


def registration(model_id: str, **fields: Any) -> mm.RegisterModelRequest:
    info = mm.ModelInfo(type=fields.pop("type", "fake"), path=fields.pop("path", "fake://1"))
    return mm.RegisterModelRequest(modelId=model_id, modelInfo=info, **fields)


async def register(rig: MeshRig, model_id: str, **fields: Any) -> Status:
    return await rig.call(MM + "registerModel", registration(model_id, **fields), Status)


async def status(rig: MeshRig, model_id: str, router: int = 0) -> Status:
    request = mm.GetStatusRequest(modelId=model_id)
    return await rig.call(MM + "getModelStatus", request, Status, router=router)


async def refused(awaitable: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value.code(), caught.value.details()


async def test_registering_alone_loads_nothing(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        assert (await register(rig, "m")).status == Status.NOT_LOADED
        assert rig.loads_of("m") == 0
        assert await rig.infer("m", 1.0) == [2.0]


async def test_registering_is_idempotent_for_the_same_attributes(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await register(rig, "m")
        assert (await register(rig, "m")).status == Status.NOT_LOADED
        code, text = await refused(register(rig, "m", path="fake://2"))
        assert code is grpc.StatusCode.ALREADY_EXISTS
        assert "Model already exists with different attribute values" in text


async def test_load_now_and_sync_answers_when_it_is_loaded(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        info = await register(rig, "m", loadNow=True, sync=True)
        assert info.status == Status.LOADED
        assert info.modelCopyInfos[0].location == rig.pods[0].instance.instance_id
        assert info.modelCopyInfos[0].copyStatus == Status.LOADED


async def test_load_now_without_sync_answers_at_once(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        gate = rig.pods[0].source.gates["m"] = asyncio.Event()
        info = await register(rig, "m", loadNow=True)
        assert info.status in (Status.NOT_LOADED, Status.LOADING)
        await until(lambda: rig.pods[0].source.fetched)
        assert (await status(rig, "m")).status == Status.LOADING
        gate.set()
        await until(lambda: rig.holders("m"))


async def test_a_failed_load_is_a_status_and_no_error(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        rig.pods[0].runtime.load_faults["m"] = [LoadFailed("corrupt")]
        info = await register(rig, "m", loadNow=True, sync=True)
        assert info.status == Status.LOADING_FAILED
        assert "corrupt" in info.errors[0]
        assert (await status(rig, "m")).status == Status.LOADING_FAILED


async def test_a_model_that_fits_nowhere_is_a_status_too(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        info = await register(rig, "m", type="unheard-of", loadNow=True, sync=True)
        assert info.status == Status.LOADING_FAILED
        assert "unheard-of" in info.errors[0]


@pytest.mark.parametrize(
    ("load_now", "given_ms", "expected_age_ms"),
    [(False, 0, 6 * 3_600_000), (True, 0, 3_600_000), (False, 1, None), (False, 1 << 62, 0)],
    ids=["6 h when not loaded", "1 h when loaded", "as given", "a time to come is now"],
)
async def test_last_used_time(
    tmp_path: Path, load_now: bool, given_ms: int, expected_age_ms: int | None
) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        await register(rig, "m", loadNow=load_now, lastUsedTime=given_ms)
        item = rig.server.get(registry.model_key("m"))
        record = registry.decode_model("m", item.value)
        if expected_age_ms is None:
            assert record.last_used_at_ms == given_ms
        else:
            age_ms = record.created_at_ms - record.last_used_at_ms
            assert age_ms == expected_age_ms


@pytest.mark.parametrize(
    ("request_", "what"),
    [
        (registration("m", type=""), "modelInfo.type"),
        (registration(""), "modelId"),
        (registration("a\nb"), "control characters"),
        (registration("x" * 600), "512"),
    ],
)
async def test_wrong_registrations_are_named(tmp_path: Path, request_: Any, what: str) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        code, text = await refused(rig.call(MM + "registerModel", request_, Status))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert what in text


async def test_unregister_unloads_and_is_no_error_when_absent(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await register(rig, "m", loadNow=True, sync=True)
        request = mm.UnregisterModelRequest(modelId="m")
        for _ in range(2):
            await rig.call(MM + "unregisterModel", request, mm.UnregisterModelResponse)
        assert (await status(rig, "m")).status == Status.NOT_FOUND
        await until(lambda: rig.pods[0].runtime.unloaded)


async def test_a_model_that_an_alias_names_cannot_be_unregistered(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        applied = await rig.apply("iris", "fake://1")
        request = mm.UnregisterModelRequest(modelId=applied.model_id)
        code, text = await refused(
            rig.call(MM + "unregisterModel", request, mm.UnregisterModelResponse)
        )
        assert code is grpc.StatusCode.FAILED_PRECONDITION
        assert "'iris'" in text


async def test_ensure_loaded(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await register(rig, "m")
        request = mm.EnsureLoadedRequest(modelId="m", sync=True)
        assert (await rig.call(MM + "ensureLoaded", request, Status)).status == Status.LOADED
        unknown = mm.EnsureLoadedRequest(modelId="nobody", sync=True)
        assert (await rig.call(MM + "ensureLoaded", unknown, Status)).status == Status.NOT_FOUND


async def test_what_one_router_registers_the_other_knows_at_once(tmp_path: Path) -> None:
    async with mesh(tmp_path, routers=2) as rig:
        await register(rig, "m")
        assert (await status(rig, "m", router=1)).status == Status.NOT_LOADED
        assert await rig.infer("m", 1.0, router=1) == [2.0]


async def test_without_the_store_writes_are_unavailable_and_status_answers(
    tmp_path: Path,
) -> None:
    async with mesh(tmp_path) as rig:
        await register(rig, "m", loadNow=True, sync=True)
        rig.server.go_away()
        code, text = await refused(register(rig, "other"))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "the store (etcd) cannot be reached" in text
        assert (await status(rig, "m")).status == Status.LOADED
        assert (await status(rig, "nobody")).status == Status.NOT_FOUND
        rig.server.come_back()


async def test_vmodel_calls_are_not_there_yet(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        request = mm.GetVModelStatusRequest(vModelId="v")
        code, _ = await refused(rig.call(MM + "getVModelStatus", request, mm.VModelStatusInfo))
        assert code is grpc.StatusCode.UNIMPLEMENTED


async def test_garbage_is_an_invalid_argument(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        method = rig.channels[0].unary_unary(MM + "registerModel")
        code, _ = await refused(method(b"\xff\xff\xff"))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
