"""The pods of a namespace, as objects of a real API server; who would run them is played."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from mesh import registry
from mesh.reconciler.config import ControllerConfig
from mesh.reconciler.controller import SpaceKey
from mesh.reconciler.kube import ApiNotFound
from mesh.reconciler.kube_resources import (
    AUTOSCALERS,
    CONFIG_MAPS,
    DEPLOYMENTS,
    INFERENCE_SERVICES,
    SERVICES,
    SERVING_RUNTIMES,
    Obj,
)
from mesh.reconciler.workload_names import HASH, OWNED_SELECTOR
from mesh.reconciler.workload_source import IDLE_AFTER
from tests.reconciler.rig import Rig, isvc, now_ms, runtime, until

pytestmark = [pytest.mark.kube, pytest.mark.etcd]

POD = "modelmesh-serving-mesh-1.x"
# The API server of the tests has neither policy/v1 nor autoscaling/v2.
KINDS = (CONFIG_MAPS, SERVICES, DEPLOYMENTS)
AT_ONCE = ControllerConfig(grace_ms=0)


async def deployment(rig: Rig, name: str = POD) -> Obj | None:
    try:
        return await rig.client.get(DEPLOYMENTS, rig.namespace, name)
    except ApiNotFound:
        return None


async def replicas(rig: Rig, count: int) -> Obj:
    async def look() -> Obj | None:
        found = await deployment(rig)
        return found if found is not None and found["spec"]["replicas"] == count else None

    found: Obj = await until(look, what=f"{count} pods")
    return found


async def deployed(rig: Rig, holds: Callable[[Obj], object]) -> Obj:
    async def look() -> Obj | None:
        found = await deployment(rig)
        return found if found is not None and holds(found) else None

    found: Obj = await until(look, what="the Deployment")
    return found


async def objects(rig: Rig) -> set[tuple[str, str]]:
    found: set[tuple[str, str]] = set()
    for kind in KINDS:
        listing = await rig.client.list(kind, rig.namespace, label_selector=OWNED_SELECTOR)
        found |= {(kind.kind, one["metadata"]["name"]) for one in listing.items}
    return found


async def left(rig: Rig, expected: set[tuple[str, str]]) -> None:
    async def look() -> bool:
        return await objects(rig) == expected

    await until(look, what=f"only {expected}")


ROUTER = {("Service", "modelmesh-serving"), ("Deployment", "modelmesh-serving")}
PODS = {
    ("ConfigMap", POD),
    ("Deployment", POD),
    ("Service", "modelmesh-serving-mesh-1-x-"),
}


async def test_a_runtime_has_pods_while_a_service_selects_it(rig: Rig) -> None:
    await rig.start(workloads=True, config=AT_ONCE)
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await replicas(rig, 0)
    await rig.apply(isvc("iris", rig.namespace))
    found = await replicas(rig, 2)
    labels = found["spec"]["template"]["metadata"]["labels"]
    assert labels["modelmesh-service"] == "modelmesh-serving" and labels["name"] == POD
    await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "iris")
    await replicas(rig, 0)
    await rig.apply(isvc("again", rig.namespace))
    await replicas(rig, 2)


async def test_it_waits_out_the_grace_period(rig: Rig) -> None:
    controller = await rig.start(workloads=True, config=ControllerConfig(grace_ms=1_500))
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace))
    await replicas(rig, 2)
    await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "iris")
    await rig.gone("iris")
    gone_ms = now_ms()
    await rig.idle()
    found = await deployment(rig)
    if now_ms() - gone_ms < 1_400:  # on a machine that was quick enough to look in time
        assert found is not None and found["spec"]["replicas"] == 2
        assert controller.queue.schedule.delayed
    await replicas(rig, 0)


async def test_the_objects_of_a_runtime_go_with_it(rig: Rig) -> None:
    await rig.start(workloads=True)
    await left(rig, ROUTER)
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await deployed(rig, lambda _: True)
    assert {one for one in await objects(rig) if "mesh-1" in one[1]} > {("Deployment", POD)}
    await rig.client.delete(SERVING_RUNTIMES, rig.namespace, "mesh-1.x")
    await left(rig, ROUTER)


async def test_a_disabled_runtime_has_none(rig: Rig) -> None:
    await rig.start(workloads=True)
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await deployed(rig, lambda _: True)
    await rig.apply(runtime("mesh-1.x", rig.namespace, disabled=True))
    await left(rig, ROUTER)
    await rig.event("mesh-1.x", "RuntimeDisabled")


async def test_a_changed_runtime_changes_its_deployment_once(rig: Rig) -> None:
    await rig.start(workloads=True)
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace))
    before = await replicas(rig, 2)
    await rig.idle()
    generation = before["metadata"]["generation"]
    await rig.apply(runtime("mesh-1.x", rig.namespace, nodeSelector={"disk": "ssd"}))
    after = await deployed(
        rig, lambda one: one["spec"]["template"]["spec"].get("nodeSelector") == {"disk": "ssd"}
    )
    await rig.idle()
    assert after["metadata"]["generation"] == generation + 1
    assert (await deployed(rig, lambda _: True)) == after
    await rig.apply(runtime("mesh-1.x", rig.namespace, replicas=3))
    await replicas(rig, 3)


async def test_a_runtime_that_cannot_be_read_keeps_its_pods(rig: Rig) -> None:
    await rig.start(workloads=True)
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace))
    before = await replicas(rig, 2)
    await rig.apply(runtime("mesh-1.x", rig.namespace, grpcDataEndpoint="port:99999"))
    await rig.event("mesh-1.x", "InvalidRuntime")
    await rig.idle()
    assert await deployment(rig) == before


async def test_nothing_is_written_while_nothing_changes(rig: Rig) -> None:
    controller = await rig.start(workloads=True)
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace))
    await replicas(rig, 2)
    await rig.idle()
    seen = {}
    for kind in KINDS:
        for one in (await rig.client.list(kind, rig.namespace)).items:
            seen[kind.kind, one["metadata"]["name"]] = one["metadata"]["resourceVersion"]
    before = rig.writes
    for _ in range(3):
        controller.queue.add(SpaceKey(rig.namespace))
        await rig.idle()
    assert rig.writes == before
    await rig.stop()
    controller = await rig.start(workloads=True)  # and the next one neither
    await rig.mesh.store.get("anything")
    await _worked(rig, controller.queue.handled_total)
    await rig.idle()
    for kind in KINDS:
        for one in (await rig.client.list(kind, rig.namespace)).items:
            version = seen.pop((kind.kind, one["metadata"]["name"]))
            assert one["metadata"]["resourceVersion"] == version
    assert not seen


async def _worked(rig: Rig, before: int) -> None:
    controller = rig.controller
    assert controller is not None
    mesh = None

    async def look() -> bool:
        nonlocal mesh
        mesh = controller.meshes.get(rig.namespace)
        return mesh is not None and mesh.synced and controller.queue.handled_total > before + 2

    await until(look, what="the controller to have looked at everything")


@pytest.mark.parametrize("drift", ["hash", "deleted", "replicas"])
async def test_what_somebody_else_did_to_it_is_mended(rig: Rig, drift: str) -> None:
    await rig.start(workloads=True)
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace))
    before = await replicas(rig, 2)
    await rig.idle()
    if drift == "deleted":
        await rig.client.delete(DEPLOYMENTS, rig.namespace, POD)
    else:
        patch: dict[str, Any] = {"spec": {"replicas": 7}}
        if drift == "hash":
            patch["metadata"] = {"annotations": {HASH: "theirs"}}
            patch["spec"]["minReadySeconds"] = 77
        await rig.client.patch(DEPLOYMENTS, rig.namespace, POD, patch)
    mark = before["metadata"]["annotations"][HASH]
    after = await deployed(
        rig,
        lambda one: (
            one["spec"]["replicas"] == 2
            and one["metadata"]["annotations"].get(HASH) == mark
            and one["metadata"]["resourceVersion"] != before["metadata"]["resourceVersion"]
        ),
    )
    assert after["spec"]["template"] == before["spec"]["template"]


async def test_an_autoscaler_bounds_the_replicas(rig: Rig) -> None:
    """The API server has no autoscaling/v2: the rest is made without."""
    one = runtime("mesh-1.x", rig.namespace)
    one["metadata"]["annotations"] = {
        "serving.kserve.io/autoscalerClass": "hpa",
        "serving.kserve.io/min-scale": "3",
        "serving.kserve.io/max-scale": "5",
    }
    controller = await rig.start(workloads=True)
    await rig.apply(one)
    await rig.apply(isvc("iris", rig.namespace))
    await replicas(rig, 3)
    assert not controller.cluster.writable(AUTOSCALERS)
    patch = {"spec": {"replicas": 4}}  # as an autoscaler would
    await rig.client.patch(DEPLOYMENTS, rig.namespace, POD, patch)
    controller.queue.add(SpaceKey(rig.namespace))
    await rig.idle()
    found = await deployment(rig)
    assert found is not None and found["spec"]["replicas"] == 4


# ---- on demand ----------------------------------------------------------------------------------


async def test_a_demand_brings_pods_and_is_met_by_one(rig: Rig) -> None:
    one = runtime("mesh-1.x", rig.namespace)
    one["metadata"]["annotations"] = {IDLE_AFTER: "10m"}
    await rig.start(workloads=True)
    await rig.apply(one)
    await rig.apply(isvc("iris", rig.namespace))
    alias = await rig.mesh.registered("iris")
    await rig.mesh.load("iris")  # its first load is over, and nobody has used it
    await replicas(rig, 0)
    offered = await rig.mesh.store.get(registry.config_key("runtimes"))
    assert offered is not None and b"rt:mesh-1.x" in offered.value
    key = registry.demand_key("mesh-1.x")
    await rig.mesh.store.put(key, registry.encode_demand(alias.target_model_id, now_ms()))
    await replicas(rig, 2)
    assert await rig.mesh.store.get(key) is not None
    await rig.mesh.instance("pod-00000002", "rt:another")
    await rig.mesh.instance("pod-00000003", "rt:mesh-1.x")

    async def met() -> bool:
        return await rig.mesh.store.get(key) is None

    await until(met, what="the demand to be met")
    controller = rig.controller
    assert controller is not None
    controller.queue.add(SpaceKey(rig.namespace))  # what was asked for is not idle when it comes
    await rig.idle()
    await replicas(rig, 2)


async def test_a_demand_for_a_runtime_that_is_not_there_is_dropped(rig: Rig) -> None:
    await rig.start(workloads=True)
    key = registry.demand_key("nobody")
    await rig.mesh.store.put(key, registry.encode_demand("iris", now_ms()))

    async def dropped() -> bool:
        return await rig.mesh.store.get(key) is None

    await until(dropped, what="the demand to go")
