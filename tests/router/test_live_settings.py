"""Live settings over the admin service: changed by whoever, followed by every router."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest

from mesh import registry
from mesh.core.policy import overridden
from mesh.store.api import Delete, Put
from protos import mesh_admin_pb2 as admin
from tests.instance.fakes import until
from tests.router.mesh_rig import ADMIN, POLICY, MeshRig

KEY = registry.config_key("policy")


@pytest.fixture
async def mesh(tmp_path: Path) -> AsyncIterator[MeshRig]:
    rig = MeshRig(tmp_path)
    yield rig
    await rig.close()


async def set_policy(rig: MeshRig, router: int = 0, **fields: Any) -> dict[str, Any]:
    overrides = orjson.dumps(fields.pop("set", {})).decode()
    request = admin.SetPolicyRequest(overrides_json=overrides, **fields)
    reply = await rig.call(ADMIN + "SetPolicy", request, admin.PolicyResponse, router=router)
    return dict(orjson.loads(reply.json))


async def get_policy(rig: MeshRig, router: int = 0) -> dict[str, Any]:
    request = admin.GetPolicyRequest()
    reply = await rig.call(ADMIN + "GetPolicy", request, admin.PolicyResponse, router=router)
    return dict(orjson.loads(reply.json))


def row(view: dict[str, Any], name: str) -> tuple[Any, Any, str]:
    (found,) = (one for one in view["rows"] if one["name"] == name)
    return found["value"], found["default"], found["source"]


def hops(rig: MeshRig) -> list[int]:
    """What every router's parts go by now."""
    return [router.admin.policy.hops_max for router in rig.routers]


async def test_what_is_set_holds_for_every_router_and_what_is_unset_does_not(
    mesh: MeshRig,
) -> None:
    await mesh.add_router()
    await mesh.add_router()
    view = await set_policy(mesh, set={"hops_max": 9, "min_copies_capacity_share": 1})
    assert row(view, "hops_max") == (9, 4, "live")
    await until(lambda: hops(mesh) == [9, 9])
    assert row(await get_policy(mesh, 1), "hops_max") == (9, 4, "live")
    view = await set_policy(mesh, 1, unset=["hops_max"])
    assert row(view, "hops_max") == (4, 4, "default")
    assert row(view, "min_copies_capacity_share") == (1.0, 0.5, "live")
    await until(lambda: hops(mesh) == [4, 4])
    await set_policy(mesh, reset=True)
    assert mesh.server.get(KEY) is None


async def test_instances_follow_too(mesh: MeshRig) -> None:
    await mesh.add_router()
    pod = await mesh.add_pod()
    await until(pod.instance.neighbours.synced.is_set)
    await set_policy(mesh, set={"load_slots": 7})
    await until(lambda: pod.instance.pod.policy.load_slots == 7)
    instance_id = pod.instance.instance_id
    view = mesh.routers[0].view
    await until(lambda: view.instances[instance_id].record.load_slots == 7)
    await set_policy(mesh, unset=["load_slots"])
    await until(lambda: pod.instance.pod.policy.load_slots == POLICY.load_slots)


async def test_a_list_tells_where_each_value_is_from_and_why_it_is_so(mesh: MeshRig) -> None:
    await mesh.add_router(policy=overridden(POLICY, {"hops_max": 5}))
    view = await get_policy(mesh)
    assert row(view, "hops_max") == (5, 4, "flag")
    assert row(view, "load_slots")[2] == "default"
    (slots,) = (one for one in view["rows"] if one["name"] == "load_slots")
    assert "overlaps" in slots["reason"]


@pytest.mark.parametrize(
    ("sentence", "stands", "request_", "said"),
    [
        ("an unknown name", {}, {"set": {"hops": 1}}, "did you mean hops_max?"),
        ("a value out of range", {}, {"set": {"hops_max": 0}}, "policy.hops_max: expected"),
        ("a text for a number", {}, {"set": {"hops_max": "4"}}, "found '4'"),
        ("at odds with what is set already", {"outlier_eject_max_ms": 2_000},
         {"set": {"outlier_eject_ms": 3_000}}, "at most outlier_eject_max_ms"),
        ("an unknown name to unset", {}, {"unset": ["hops"]}, "did you mean hops_max?"),
        ("set and unset at once", {}, {"set": {"hops_max": 3}, "unset": ["hops_max"]}, "both"),
        ("no object", {}, {"overrides": "[1]"}, "expected a JSON object"),
        ("no JSON", {}, {"overrides": "{"}, "not JSON"),
    ],
)  # fmt: skip
async def test_nonsense_is_refused_and_changes_nothing(
    mesh: MeshRig, sentence: str, stands: dict[str, Any], request_: dict[str, Any], said: str
) -> None:
    await mesh.add_router()
    if stands:
        await set_policy(mesh, set=stands)
    before = mesh.server.get(KEY)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        if "overrides" in request_:
            request = admin.SetPolicyRequest(overrides_json=request_["overrides"])
            await mesh.call(ADMIN + "SetPolicy", request, admin.PolicyResponse)
        else:
            await set_policy(mesh, **request_)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert said in (caught.value.details() or "")
    assert mesh.server.get(KEY) == before


async def test_nonsense_that_stands_in_the_store_is_told_and_the_last_good_policy_stays(
    mesh: MeshRig,
) -> None:
    (router,) = [await mesh.add_router()]
    await set_policy(mesh, set={"hops_max": 9})
    mesh.server.apply([Put(KEY, b'{"hops_max": -1}')])
    await until(lambda: bool(router.live_policy.refused))
    assert hops(mesh) == [9]
    assert "policy.hops_max" in (await get_policy(mesh))["refused"]
    assert row(await set_policy(mesh, unset=["hops_max"]), "hops_max") == (4, 4, "default")
    assert (await get_policy(mesh))["refused"] == ""


async def test_a_threshold_of_another_version_stays_in_the_store_and_can_be_taken_away(
    mesh: MeshRig,
) -> None:
    await mesh.add_router()
    mesh.server.apply([Put(KEY, b'{"newer_ms": 5}')])
    view = await set_policy(mesh, set={"hops_max": 9})
    assert row(view, "hops_max") == (9, 4, "live")
    assert ["newer_ms" in text for text in view["warnings"]] == [True]
    found = mesh.server.get(KEY)
    assert found is not None
    assert orjson.loads(found.value) == {"hops_max": 9, "newer_ms": 5}
    assert (await set_policy(mesh, unset=["newer_ms"]))["warnings"] == []
    assert hops(mesh) == [9]


async def test_a_value_that_is_no_object_can_be_replaced(mesh: MeshRig) -> None:
    await mesh.add_router()
    mesh.server.apply([Put(KEY, b"[]")])
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await set_policy(mesh, set={"hops_max": 3})
    assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
    await set_policy(mesh, set={"hops_max": 3}, reset=True)
    assert hops(mesh) == [3]


async def test_two_who_change_different_thresholds_at_once_both_succeed(mesh: MeshRig) -> None:
    await mesh.add_router()
    await mesh.add_router()
    wanted = {"hops_max": 9, "load_slots": 3, "drain_moves": 7, "max_load_failures": 2}
    await asyncio.gather(
        *(set_policy(mesh, at % 2, set={k: v}) for at, (k, v) in enumerate(wanted.items()))
    )
    found = mesh.server.get(KEY)
    assert found is not None
    assert orjson.loads(found.value) == wanted


async def test_while_the_store_is_away_a_change_is_unavailable_and_a_list_is_not(
    mesh: MeshRig,
) -> None:
    await mesh.add_router()
    mesh.server.go_away()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await set_policy(mesh, set={"hops_max": 9})
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert "etcd" in (caught.value.details() or "")
    assert row(await get_policy(mesh), "hops_max")[2] == "default"
    mesh.server.come_back()


async def test_an_instances_lease_is_warned_about(mesh: MeshRig) -> None:
    await mesh.add_router()
    view = await set_policy(mesh, set={"instance_lease_ttl_ms": 20_000})
    assert ["instance_lease_ttl_ms" in text for text in view["warnings"]] == [True]


# ---- constraints of formats ----------------------------------------------------------------------


async def set_constraints(rig: MeshRig, value: Any) -> Any:
    request = admin.SetTypeConstraintsRequest(json=orjson.dumps(value).decode())
    reply = await rig.call(ADMIN + "SetTypeConstraints", request, admin.TypeConstraintsResponse)
    return orjson.loads(reply.json)


async def test_constraints_are_set_read_and_taken_away(mesh: MeshRig) -> None:
    await mesh.add_router()
    await mesh.add_router()
    wanted = {"onnx": {"required": ["gpu"], "preferred": ["a100"]}}
    assert await set_constraints(mesh, wanted) == wanted
    await until(lambda: all("onnx" in router.view.type_constraints for router in mesh.routers))
    request = admin.GetTypeConstraintsRequest()
    for router in (0, 1):
        reply = await mesh.call(
            ADMIN + "GetTypeConstraints", request, admin.TypeConstraintsResponse, router=router
        )
        assert orjson.loads(reply.json) == wanted
    assert await set_constraints(mesh, {}) == {}
    assert mesh.server.get(registry.config_key("type_constraints")) is None


@pytest.mark.parametrize("value", [[], {"onnx": []}, {"onnx": {"require": ["gpu"]}},
                                   {"onnx": {"required": "gpu"}}])  # fmt: skip
async def test_constraints_that_make_no_sense_are_refused(mesh: MeshRig, value: Any) -> None:
    await mesh.add_router()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await set_constraints(mesh, value)
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    assert mesh.server.get(registry.config_key("type_constraints")) is None


async def test_a_setting_that_goes_from_the_store_goes_from_the_routers(mesh: MeshRig) -> None:
    await mesh.add_router()
    await set_policy(mesh, set={"hops_max": 9})
    mesh.server.apply([Delete(KEY)])
    await until(lambda: hops(mesh) == [4])
