"""The admin service: apply, list, describe, delete, explain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest

from mesh import registry
from mesh.admin_views import (
    Explanation,
    InstanceRow,
    ModelDescription,
    ModelRow,
    decode,
    decode_list,
)
from mesh.core.errors import LoadFailed
from mesh.core.types import CopyRecord, CopyState
from mesh.store.api import Put
from protos import mesh_admin_pb2 as pb
from tests.instance.fakes import MIB, until
from tests.router.mesh_rig import ADMIN, MeshRig, isvc, mesh


async def list_models(rig: MeshRig) -> dict[str, ModelRow]:
    reply = await rig.call(ADMIN + "List", pb.ListRequest(kind="models"), pb.ListResponse)
    return {row.name: row for row in decode_list(ModelRow, reply.items_json)}


async def describe(rig: MeshRig, name: str) -> ModelDescription:
    reply = await rig.call(ADMIN + "Describe", pb.DescribeRequest(name=name), pb.DescribeResponse)
    return decode(ModelDescription, reply.json)


async def explain(rig: MeshRig, name: str) -> Explanation:
    reply = await rig.call(ADMIN + "Explain", pb.ExplainRequest(name=name), pb.ExplainResponse)
    return decode(Explanation, reply.json)


async def delete(rig: MeshRig, name: str) -> bool:
    reply = await rig.call(ADMIN + "Delete", pb.DeleteRequest(name=name), pb.DeleteResponse)
    return reply.existed


async def refused(awaitable: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value.code(), caught.value.details()


async def test_apply_creates_then_changes_nothing_then_configures(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        first = await rig.apply("iris", "fake://1")
        assert (first.name, first.action) == ("iris", "created")
        assert first.model_id.startswith("iris__isvc-")
        assert (await rig.apply("iris", "fake://1")).action == "unchanged"
        again = await rig.apply("iris", "fake://1", minReplicas=2)
        assert (again.action, again.model_id) == ("configured", first.model_id)
        assert rig.routers[0].view.models[first.model_id].min_copies == 2
        changed = await rig.apply("iris", "fake://2")
        assert changed.action == "configured"
        assert changed.model_id != first.model_id


async def test_apply_with_load_now_loads_where_there_is_room(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        manifest = orjson.dumps(isvc("iris", "fake://1"))
        request = pb.ApplyRequest(manifest_json=manifest, load_now=True)
        await rig.call(ADMIN + "Apply", request, pb.ApplyResponse)
        await until(lambda: rig.pods[0].pod.servables)


async def test_a_wrong_field_is_named_by_its_path(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        wrong = isvc("iris", "fake://1", minReplicas="two")
        request = pb.ApplyRequest(manifest_json=orjson.dumps(wrong))
        code, text = await refused(rig.call(ADMIN + "Apply", request, pb.ApplyResponse))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "spec.predictor.minReplicas" in text


async def test_an_unknown_field_is_a_warning(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        applied = await rig.apply("iris", "fake://1", flavour="sweet")
        assert any("spec.predictor.flavour" in warning for warning in applied.warnings)


async def test_another_namespace_is_a_warning(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        resource = isvc("iris", "fake://1")
        resource["metadata"]["namespace"] = "elsewhere"
        request = pb.ApplyRequest(manifest_json=orjson.dumps(resource))
        reply = await rig.call(ADMIN + "Apply", request, pb.ApplyResponse)
        assert any("'elsewhere'" in warning for warning in reply.warnings)


@pytest.mark.parametrize("raw", [b"{", b"[]", b"3"])
async def test_what_is_no_resource_is_an_invalid_argument(tmp_path: Path, raw: bytes) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        request = pb.ApplyRequest(manifest_json=raw)
        code, text = await refused(rig.call(ADMIN + "Apply", request, pb.ApplyResponse))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "manifest_json" in text


async def test_apply_without_the_store_is_unavailable(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        rig.server.go_away()
        code, text = await refused(rig.apply("iris", "fake://1"))
        assert code is grpc.StatusCode.UNAVAILABLE
        assert "etcd" in text
        rig.server.come_back()


async def test_a_name_that_is_a_registered_model_cannot_be_applied(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        await rig.register("iris")
        code, _ = await refused(rig.apply("iris", "fake://1"))
        assert code is grpc.StatusCode.ALREADY_EXISTS


async def test_list_shows_names_that_clients_use(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        applied = await rig.apply("iris", "fake://1")
        await rig.register("direct")
        await rig.infer("iris", 1.0)
        rows = await list_models(rig)
        assert set(rows) == {"iris", "direct"}
        iris = rows["iris"]
        assert iris.alias
        assert iris.model_id == applied.model_id
        assert iris.state == "LOADED"
        assert iris.copies_loaded == 1
        assert iris.size_bytes == MIB
        assert iris.last_used_at_ms > 0
        assert rows["direct"].state == "NOT_LOADED"
        assert rows["direct"].last_used_at_ms == 0


async def test_list_instances(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2) as rig:
        reply = await rig.call(ADMIN + "List", pb.ListRequest(kind="instances"), pb.ListResponse)
        rows = decode_list(InstanceRow, reply.items_json)
        assert [row.instance_id for row in rows] == sorted(
            pod.instance.instance_id for pod in rig.pods
        )
        assert rows[0].state == "READY"
        assert rows[0].capacity_bytes == 10 * MIB


async def test_list_instances_shows_what_is_in_memory_and_not_what_waits_for_it(
    tmp_path: Path,
) -> None:
    async with mesh(tmp_path) as rig:
        instance = rig.pods[0].instance
        for n in range(20):
            name = f"queued-{n}"
            record = CopyRecord(name, instance.instance_id, CopyState.LOADING, size_bytes=MIB)
            rig.server.apply([Put(registry.key_of(record), registry.encode(record))])

        slots = rig.routers[0].view.instances
        await until(lambda: slots[instance.instance_id].loads_in_progress == 20)
        reply = await rig.call(ADMIN + "List", pb.ListRequest(kind="instances"), pb.ListResponse)
        [told] = decode_list(InstanceRow, reply.items_json)
        assert told.loading_count == 20
        assert told.used_bytes == instance.pod.cache.used_bytes == 0


async def test_an_unknown_kind_is_named(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        asked = rig.call(ADMIN + "List", pb.ListRequest(kind="cows"), pb.ListResponse)
        code, text = await refused(asked)
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert "cows" in text


async def test_describe_asks_the_instances(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.apply("iris", "fake://1")
        await rig.infer("iris", 1.0)
        told = await describe(rig, "iris")
        assert told.manifest["kind"] == "InferenceService"
        assert told.active.copies[0].instance_id == rig.pods[0].instance.instance_id
        assert told.active.copies[0].details
        assert told.target is None
        assert not told.unreachable


async def test_a_use_shows_before_instances_flush_it(tmp_path: Path) -> None:
    async with mesh(tmp_path, routers=2) as rig:
        applied = await rig.apply("iris", "fake://1")
        await rig.infer("iris", 1.0)
        # The other router asks the instance.
        reply = await rig.call(
            ADMIN + "Describe", pb.DescribeRequest(name="iris"), pb.DescribeResponse, router=1
        )
        told = decode(ModelDescription, reply.json)
        assert told.row.last_used_at_ms == told.active.last_used_at_ms > 0
        # An evicted model was used all the same.
        await rig.routers[0].loads.unload(applied.model_id, rig.pods[0].instance.instance_id)
        row = (await list_models(rig))["iris"]
        assert (row.copies_loaded, row.last_used_at_ms > 0) == (0, True)


async def test_describe_names_an_instance_that_does_not_answer(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.apply("iris", "fake://1")
        await rig.infer("iris", 1.0)
        await rig.pods[0].instance.server.close()
        told = await describe(rig, "iris")
        assert set(told.unreachable) == {rig.pods[0].instance.instance_id}


async def test_describe_tells_the_cause_of_a_failure(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        applied = await rig.apply("iris", "fake://1")
        rig.pods[0].runtime.load_faults[applied.model_id] = [LoadFailed("no such artifact")]
        await refused(rig.infer("iris", 1.0))
        told = await describe(rig, "iris")
        assert told.row.state == "LOADING_FAILED"
        assert "no such artifact" in told.active.failures[0].message


async def test_what_failed_is_tried_again_at_once_when_failures_are_forgotten(
    tmp_path: Path,
) -> None:
    async with mesh(tmp_path, routers=2) as rig:
        applied = await rig.apply("iris", "fake://1")
        rig.pods[0].runtime.load_faults[applied.model_id] = [LoadFailed("no such entry")]
        await refused(rig.infer("iris", 1.0))
        await refused(rig.infer("iris", 1.0))  # the instance is not asked again
        assert rig.loads_of(applied.model_id) == 1
        request = pb.ForgetFailuresRequest()
        path = ADMIN + "ForgetFailures"
        assert (await rig.call(path, request, pb.ForgetFailuresResponse)).models == 1
        views = [router.view for router in rig.routers]
        await until(lambda: not any(view.failures_of(applied.model_id, 0) for view in views))
        assert await rig.infer("iris", 1.0) == [2.0]
        assert (await rig.call(path, request, pb.ForgetFailuresResponse)).models == 0


async def test_describe_and_delete_of_nothing(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        code, text = await refused(describe(rig, "nobody"))
        assert code is grpc.StatusCode.NOT_FOUND
        assert "nobody" in text
        assert not await delete(rig, "nobody")


async def test_delete_takes_the_alias_and_its_models(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        applied = await rig.apply("iris", "fake://1")
        await rig.infer("iris", 1.0)
        assert await delete(rig, "iris")
        assert rig.server.get(registry.vmodel_key("iris")) is None
        assert rig.server.get(registry.model_key(applied.model_id)) is None
        await until(lambda: not rig.pods[0].pod.servables)
        assert await list_models(rig) == {}


async def test_explain_before_and_after_the_first_request(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.apply("iris", "fake://1")
        before = await explain(rig, "iris")
        instance_id = rig.pods[0].instance.instance_id
        assert (before.action, before.instance_id) == ("load", instance_id)
        assert before.reason == "only_candidate"
        assert [c.instance_id for c in before.candidates if c.chosen] == [instance_id]
        await rig.infer("iris", 1.0)
        after = await explain(rig, "iris")
        assert (after.action, after.reason) == ("hit", "only_copy")
        assert (await explain(rig, "nobody")).action == "not_found"
