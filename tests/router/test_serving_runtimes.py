"""ServingRuntimes that are applied to a router: kept, chosen by KServe's rules, told of."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest

from mesh import registry
from mesh.core.types import ModelRecord
from mesh.runtime_selection import RuntimeOffer
from mesh.store.api import Put
from protos import mesh_admin_pb2 as pb
from tests.instance.fakes import until
from tests.router.mesh_rig import ADMIN, MeshRig, mesh, on_runtime, serving_runtime


async def listed(rig: MeshRig, *names: str) -> list[dict[str, Any]]:
    request = pb.ListRequest(kind="servingruntimes", names=names)
    reply = await rig.call(ADMIN + "List", request, pb.ListResponse)
    return list(orjson.loads(reply.items_json))


async def delete(rig: MeshRig, name: str, kind: str = "") -> bool:
    request = pb.DeleteRuntimeRequest(name=name, kind=kind)
    return bool((await rig.call(ADMIN + "DeleteRuntime", request, pb.DeleteResponse)).existed)


async def refused(awaitable: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await awaitable
    return caught.value.code(), caught.value.details()


def model_of(rig: MeshRig, reply: pb.ApplyResponse, router: int = 0) -> ModelRecord:
    return rig.routers[router].view.models[reply.model_id]


async def test_a_runtime_is_kept_listed_and_forgotten(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        first = await rig.apply_resource(serving_runtime("rt"))
        assert (first.name, first.model_id, first.action) == ("rt", "", "created")
        (warning,) = first.warnings
        assert "no pods are started for 'rt' here" in warning
        assert rig.pods[0].instance.instance_id in warning
        assert (await rig.apply_resource(serving_runtime("rt"))).action == "unchanged"
        assert (
            await rig.apply_resource(serving_runtime("rt", disabled=True))
        ).action == "configured"
        await rig.apply_resource(serving_runtime("rt", "ClusterServingRuntime"))
        kinds = [(one["kind"], one["metadata"]["name"]) for one in await listed(rig, "rt")]
        assert kinds == [("ClusterServingRuntime", "rt"), ("ServingRuntime", "rt")]
        assert await listed(rig, "other") == []
        assert await delete(rig, "rt", "ServingRuntime")
        assert not await delete(rig, "rt", "ServingRuntime")
        assert await delete(rig, "rt")
        assert await listed(rig) == []


async def test_a_runtime_keeps_the_time_of_its_first_apply(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        ahead = serving_runtime("rt")
        ahead["metadata"] |= {"creationTimestamp": "2001-01-01T00:00:00Z", "uid": "u"}
        await rig.apply_resource(ahead)
        (first,) = await listed(rig)
        assert "uid" not in first["metadata"]
        created = first["metadata"]["creationTimestamp"]
        assert created > "2001-01-01T00:00:00Z"
        key = registry.config_key("servingruntimes")
        first["metadata"]["creationTimestamp"] = "2002-02-02T00:00:00Z"
        rig.server.apply([Put(key, registry.encode_config({"ServingRuntime/rt": first}))])
        await rig.apply_resource(serving_runtime("rt", disabled=True))
        (again,) = await listed(rig)
        assert again["metadata"]["creationTimestamp"] == "2002-02-02T00:00:00Z"


async def test_without_runtimes_a_named_one_is_a_warning(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        reply = await rig.apply_resource(on_runtime("n", "rt"))
        assert any("kept, not acted on" in warning for warning in reply.warnings)
        assert model_of(rig, reply).required_labels == ()


async def test_a_runtime_that_is_named_is_required(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.apply_resource(serving_runtime("rt"))
        reply = await rig.apply_resource(on_runtime("n", "rt"))
        assert model_of(rig, reply).required_labels == ("rt:rt",)
        (warning,) = reply.warnings
        assert "no instance of the runtime 'rt' serves 'fake' now" in warning
        await rig.add_pod(labels=("rt:rt",))
        assert not (await rig.apply_resource(on_runtime("n", "rt"))).warnings
        await rig.apply_resource(on_runtime("n2", "rt"), load_now=True)
        await until(lambda: rig.pods[1].pod.servables)
        assert not rig.pods[0].pod.servables


async def test_without_a_name_the_best_is_preferred(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        low = [{"name": "fake", "version": "1", "autoSelect": True, "priority": 1}]
        high = [{"name": "fake", "version": "1", "autoSelect": True, "priority": 2}]
        await rig.apply_resource(
            serving_runtime("cluster", "ClusterServingRuntime", supportedModelFormats=high)
        )
        await rig.apply_resource(serving_runtime("low", supportedModelFormats=low))
        reply = await rig.apply("a", "fake://1")
        assert model_of(rig, reply).preferred_labels == ("rt:low",)
        told = await rig.apply_resource(serving_runtime("high", supportedModelFormats=high))
        assert any("apply the InferenceServices again" in text for text in told.warnings)
        again = await rig.apply("a", "fake://1")
        assert (again.action, again.model_id) == ("configured", reply.model_id)
        assert model_of(rig, reply).preferred_labels == ("rt:high",)


@pytest.mark.parametrize(
    ("resource", "reason"),
    [
        (on_runtime("n", "other"), "RuntimeNotRecognized"),
        (on_runtime("n", "off"), "RuntimeDisabled"),
        (on_runtime("n", "text"), "NoSupportingRuntime"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
async def test_a_refusal_has_kserves_reason_and_registers_nothing(
    tmp_path: Path, resource: dict[str, Any], reason: str
) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        await rig.apply_resource(serving_runtime("off", disabled=True))
        await rig.apply_resource(serving_runtime("text", supportedModelFormats=[{"name": "text"}]))
        code, text = await refused(rig.apply_resource(resource))
        assert code is grpc.StatusCode.FAILED_PRECONDITION and text.startswith(f"{reason}: ")
        code, text = await refused(rig.apply("auto", "fake://1"))
        assert text.startswith("NoSupportingRuntime: ")
        assert not rig.routers[0].view.models


async def test_every_router_chooses_by_it(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0, routers=2) as rig:
        await rig.apply_resource(serving_runtime("rt"))
        offers = [router.admin.runtimes.offers for router in rig.routers]
        await until(lambda: offers[1]())
        with pytest.raises(grpc.aio.AioRpcError, match="RuntimeNotRecognized"):
            await rig.apply_resource(on_runtime("n", "other"), router=1)
        await delete(rig, "rt")
        await until(lambda: not offers[1]())


async def test_an_entry_that_cannot_be_read_is_passed_over_and_stays(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        key = registry.config_key("servingruntimes")
        entries = {"ServingRuntime/new": {"kind": "ServingRuntime", "spec": 3}}
        rig.server.apply([Put(key, registry.encode_config(entries))])
        view = rig.routers[0].view
        await until(lambda: "servingruntimes" in view.config)
        assert rig.routers[0].admin.runtimes.offers() == ()
        await rig.apply_resource(serving_runtime("rt"))
        (offer,) = rig.routers[0].admin.runtimes.offers()
        assert isinstance(offer, RuntimeOffer) and offer.runtime.name == "rt"
        assert set(view.config["servingruntimes"]) == {"ServingRuntime/new", "ServingRuntime/rt"}


def _without_formats() -> dict[str, Any]:
    return serving_runtime("rt", supportedModelFormats=[])


@pytest.mark.parametrize(
    ("resource", "told"),
    [
        (_without_formats(), "spec.supportedModelFormats"),
        (serving_runtime("Not_A_Name"), "metadata.name"),
        ({"kind": "Secret", "metadata": {"name": "storage-config"}, "data": {"k": "c2VjcmV0"}},
         "kind: expected one of InferenceService, Predictor, ServingRuntime"),
        ({"kind": "TrainedModel"}, "found 'TrainedModel'"),
        ({"kind": "InferenceGraph", "metadata": {}}, "metadata.name"),
        (serving_runtime("rt", containers=[{"name": "x" * 1_048_576}]), "at most 1048576 bytes"),
    ],
    ids=itertools.count(),
)  # fmt: skip
async def test_what_cannot_be_applied_is_named(
    tmp_path: Path, resource: dict[str, Any], told: str
) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        code, text = await refused(rig.apply_resource(resource))
        assert code is grpc.StatusCode.INVALID_ARGUMENT
        assert told in text and "c2VjcmV0" not in text


async def test_a_graph_is_accepted_and_said_to_be_skipped(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        graph = {"kind": "InferenceGraph", "metadata": {"name": "g"}, "spec": {"nodes": {}}}
        reply = await rig.apply_resource(graph)
        assert (reply.name, reply.model_id, reply.action) == ("g", "", "skipped")
        assert "not acted on by this mesh" in reply.warnings[0]
