"""The status of applied resources: what a router tells is what a controller writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import orjson
import pytest

from mesh.core.errors import LoadFailed
from mesh.core.types import FailureRecord
from mesh.kserve_status import name_state, rfc3339, same_status
from mesh.manifest import parse_resource
from mesh.reconciler.plan import FINALIZER, Observed, StorageSecret, WriteStatus, plan_service
from protos import mesh_admin_pb2 as pb
from router.process import Router
from router.resource_status import own_endpoints
from tests.instance.fakes import until
from tests.router.mesh_rig import ADMIN, MeshRig, isvc, mesh, on_runtime, serving_runtime

NOW_MS = 1_700_000_000_000


def predictor(name: str) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "Predictor",
        "metadata": {"name": name},
        "spec": {
            "modelType": {"name": "fake"},
            "path": "m",
            "storage": {"s3": {"secretKey": "k", "bucket": "b"}},
        },
    }


async def told(rig: MeshRig, kind: str = "inferenceservices", *names: str) -> list[Any]:
    request = pb.ListRequest(kind=kind, names=names)
    reply = await rig.call(ADMIN + "List", request, pb.ListResponse)
    return list(orjson.loads(reply.items_json))


def condition(resource: dict[str, Any], kind: str) -> dict[str, str]:
    (found,) = (one for one in resource["status"]["conditions"] if one["type"] == kind)
    return dict(found)


def written_by_a_controller(router: Router, resource: dict[str, Any]) -> dict[str, Any]:
    """The status of the same resource, had an API server sent it, by the controller's plan over the
    same registry."""
    name = resource["metadata"]["name"]
    alias = router.view.vmodels[name]
    sent = orjson.loads(alias.manifest)
    sent["metadata"] |= {"uid": "u", "finalizers": [FINALIZER]}
    kept = parse_resource(sent).alias.manifest
    observed = Observed(
        kind=resource["kind"],
        state=replace(name_state(router.view, name, NOW_MS), alias=replace(alias, manifest=kept)),
        endpoints=router.admin.statuses.endpoints(),
        secret=StorageSecret("storage-config", "default", readable=False),
        now_ms=NOW_MS,
        offers=router.admin.runtimes.offers(),
        take_all=True,
    )
    (status,) = (a.status for a in plan_service(sent, observed) if isinstance(a, WriteStatus))
    return status


async def fails(rig: MeshRig, reply: pb.ApplyResponse) -> None:
    for pod in rig.pods:
        pod.runtime.load_faults[reply.model_id] = [LoadFailed("no such bucket: b")] * 5


async def test_one_resource_has_one_status_here_and_in_a_cluster(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        (router,) = rig.routers
        await rig.add_pod(labels=("rt:rt",))
        await rig.apply_resource(serving_runtime("rt"))
        await rig.apply_resource(serving_runtime("all", "ClusterServingRuntime"))
        await rig.apply_resource(isvc("good", "fake://1"))
        await rig.apply_resource(on_runtime("by-name", "all"))
        await fails(rig, await rig.apply_resource(isvc("bad", "fake://2")))
        await rig.apply_resource(isvc("changed", "fake://3"))
        await rig.infer("good", 1.0)
        await rig.infer("changed", 1.0)
        with pytest.raises(grpc.aio.AioRpcError):
            await rig.infer("bad", 1.0)
        again = isvc("changed", "fake://4")
        await fails(rig, await rig.apply_resource(again))
        await until(lambda: router.view.vmodels["changed"].failed)

        async def seen() -> dict[str, tuple[str, str, str]]:
            found = {}
            for resource in await told(rig):
                status, name = resource["status"], resource["metadata"]["name"]
                assert same_status(status, written_by_a_controller(router, resource)), name
                active = status["modelStatus"]["states"]["activeModelState"]
                transition = status["modelStatus"]["transitionStatus"]
                found[name] = (condition(resource, "Ready")["status"], active, transition)
            return found

        assert await seen() == {
            "good": ("True", "Loaded", "UpToDate"),
            "bad": ("False", "FailedToLoad", "BlockedByFailedLoad"),
            "changed": ("True", "Loaded", "BlockedByFailedLoad"),
            "by-name": ("True", "Standby", "UpToDate"),
        }
        (one,) = await told(rig, "inferenceservices", "by-name")
        assert one["status"]["clusterServingRuntimeName"] == "all"
        request = pb.DeleteRuntimeRequest(name="all")
        await rig.call(ADMIN + "DeleteRuntime", request, pb.DeleteResponse)
        assert (await seen())["by-name"] == ("True", "Standby", "InvalidSpec")


async def test_a_resource_is_shown_as_it_was_applied(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.apply_resource(isvc("iris", "fake://1"))
        await rig.apply_resource(predictor("old"))
        await rig.infer("iris", 1.0)
        (resource,) = await told(rig)
        bound = rig.bounds[0]
        status = resource.pop("status")
        assert resource["metadata"].pop("creationTimestamp").endswith("Z")
        assert resource["metadata"].pop("namespace") == "default"
        assert resource == isvc("iris", "fake://1")
        assert status["url"] == f"grpc://127.0.0.1:{bound.grpc_port}"
        assert status["address"] == {"url": f"http://127.0.0.1:{bound.rest_port}"}
        model_id = rig.routers[0].view.vmodels["iris"].active_model_id
        assert status["components"]["predictor"]["latestReadyRevision"] == model_id
        assert "servingRuntimeName" not in status
        (old,) = await told(rig, "predictors")
        assert old["metadata"]["name"] == "old"
        assert (old["status"]["available"], old["status"]["activeModelState"]) == (True, "Standby")
        assert await told(rig, "predictors", "iris", "nobody") == []


async def test_what_a_controller_registered_has_the_services_addresses(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0, namespace="ns") as rig:
        resource = isvc("iris", "fake://1")
        resource["metadata"] |= {"uid": "u", "generation": 3}
        await rig.apply_resource(resource)
        await rig.apply_resource(serving_runtime("other", supportedModelFormats=[{"name": "text"}]))
        (found,) = await told(rig)
        assert found["status"]["url"] == "grpc://modelmesh-serving.ns:8033"
        # It is the controller's to choose a runtime for it.
        assert found["status"]["modelStatus"]["transitionStatus"] != "InvalidSpec"


async def test_a_condition_dates_from_the_record_that_says_so(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        reply = await rig.apply_resource(isvc("iris", "fake://1"))
        view = rig.routers[0].view
        (resource,) = await told(rig)
        since = condition(resource, "Ready")["lastTransitionTime"]
        assert since == rfc3339(view.vmodels["iris"].updated_at_ms)
        failed_at_ms = NOW_MS + 10**11
        failure = FailureRecord(
            reply.model_id, "i", "INTERNAL", "x", failed_at_ms, failed_at_ms + 60_000
        )
        view.put_failure(failure)
        (resource,) = await told(rig)
        ready = condition(resource, "Ready")
        assert (ready["status"], ready["lastTransitionTime"]) == ("False", rfc3339(failed_at_ms))


async def test_describe_has_the_status(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        await rig.apply_resource(isvc("iris", "fake://1"))
        await rig.register("direct")
        for name, kinds in (("iris", ["IngressReady", "PredictorReady", "Ready"]), ("direct", [])):
            request = pb.DescribeRequest(name=name)
            reply = await rig.call(ADMIN + "Describe", request, pb.DescribeResponse)
            status = orjson.loads(reply.json)["status"] or {}
            assert [one["type"] for one in status.get("conditions", ())] == kinds


async def test_an_unknown_kind_is_refused_with_those_that_there_are(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=0) as rig:
        with pytest.raises(grpc.aio.AioRpcError, match="inferenceservices, predictors, serving"):
            await told(rig, "fish")


@pytest.mark.parametrize(
    ("host", "rest_port", "tls", "expected"),
    [
        ("0.0.0.0", 2, False, ("grpc://127.0.0.1:1", "http://127.0.0.1:2")),
        ("::", 2, True, ("grpc://[::1]:1", "https://[::1]:2")),
        ("mesh.example", None, False, ("grpc://mesh.example:1", "")),
    ],
)
def test_addresses_are_ones_that_can_be_reached(
    host: str, rest_port: int | None, tls: bool, expected: tuple[str, str]
) -> None:
    found = own_endpoints(host, 1, rest_port, tls=tls)
    assert (found.grpc, found.rest) == expected
