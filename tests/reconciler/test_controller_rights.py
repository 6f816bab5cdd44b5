"""A controller that lacks one right: it says which, and everything else goes on."""

from __future__ import annotations

import pytest

from mesh.reconciler.kube_resources import (
    DEPLOYMENTS,
    INFERENCE_SERVICES,
    SECRETS,
    SERVICES,
    SERVING_RUNTIMES,
)
from tests.reconciler.access import allow, granted
from tests.reconciler.rig import Rig, isvc, runtime, until

pytestmark = [pytest.mark.kube, pytest.mark.etcd]

USER = "controller"


async def said(caplog: pytest.LogCaptureFixture, text: str) -> None:
    async def look() -> bool:
        return text in caplog.text

    await until(look, what=f"{text!r} in the log")


async def test_the_rights_of_the_table_are_enough(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with granted(rig.server, rig.namespace, USER):
        controller = await rig.start(kubeconfig=rig.server.kubeconfig(USER), workloads=True)
        await rig.mesh.instance()
        await rig.apply(runtime("mesh-1.x", rig.namespace))
        await rig.apply(isvc("bad", rig.namespace, runtime="nobody"))
        await rig.apply(isvc("iris", rig.namespace))
        await rig.mesh.registered("iris")
        await rig.mesh.load("iris")
        await rig.ready("iris")
        await rig.event("bad", "RuntimeNotRecognized")
        await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "iris")
        await rig.gone("iris")
        await rig.idle()
        secret = {
            "metadata": {"name": "storage-config", "namespace": rig.namespace},
            "stringData": {"minio": "{}"},
        }
        await rig.client.create(SECRETS, secret)
        await rig.idle()

        async def looked_at_pods() -> bool:
            return any(plural == "pods" for _, plural, _ in rig.calls)

        await until(looked_at_pods, what="the pods to be told of the secret")
        assert controller.not_ready() == ""
        assert not [one for one in rig.calls if one[2] == 403], caplog.text
        await rig.stop()


@pytest.mark.parametrize(
    ("resource", "verb"),
    [
        ("events", "create"),
        ("secrets", "list"),
        ("configmaps", "list"),
        ("pods", "list"),
        ("predictors", "watch"),
    ],
)
async def test_models_are_served_all_the_same(
    rig: Rig, caplog: pytest.LogCaptureFixture, resource: str, verb: str
) -> None:
    with granted(rig.server, rig.namespace, USER, but=(resource, verb)):
        await rig.start(kubeconfig=rig.server.kubeconfig(USER))
        await rig.mesh.instance()
        await rig.apply(runtime("mesh-1.x", rig.namespace))
        await rig.apply(isvc("bad", rig.namespace, runtime="nobody"))
        await rig.apply(isvc("iris", rig.namespace))
        await rig.mesh.registered("iris")
        await rig.mesh.load("iris")
        await rig.ready("iris")
        if resource != "pods":  # which nobody asks for before the secret changes
            await said(caplog, f"cannot {verb} {resource}")
        await rig.stop()


async def test_a_status_that_may_not_be_written(rig: Rig, caplog: pytest.LogCaptureFixture) -> None:
    but = ("inferenceservices/status", "update")
    with granted(rig.server, rig.namespace, USER, but=but):
        await rig.start(kubeconfig=rig.server.kubeconfig(USER))
        await rig.apply(runtime("mesh-1.x", rig.namespace))
        await rig.apply(isvc("iris", rig.namespace))
        await rig.mesh.registered("iris")
        await said(caplog, "cannot update inferenceservices.serving.kserve.io/status iris")
        await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "iris")
        await rig.gone("iris")
        await rig.stop()


async def test_one_kind_of_object_that_may_not_be_made(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    with granted(rig.server, rig.namespace, USER, but=("services", "create")):
        await rig.start(kubeconfig=rig.server.kubeconfig(USER), workloads=True)
        await rig.apply(runtime("mesh-1.x", rig.namespace))
        await rig.apply(isvc("iris", rig.namespace))
        await rig.mesh.registered("iris")
        await said(caplog, "cannot patch services modelmesh-serving")

        async def made() -> bool:
            found = await rig.client.list(DEPLOYMENTS, rig.namespace)
            names = {one["metadata"]["name"] for one in found.items}
            return names == {"modelmesh-serving", "modelmesh-serving-mesh-1.x"}

        await until(made, what="the Deployments")
        assert not (await rig.client.list(SERVICES, rig.namespace)).items
        await rig.stop()


async def test_runtimes_that_may_not_be_listed_cost_no_pods_and_hold_no_deletion(
    rig: Rig, caplog: pytest.LogCaptureFixture
) -> None:
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("goes", rig.namespace))
    await rig.start(workloads=True)
    await rig.mesh.registered("goes")
    await rig.idle()
    await rig.stop()
    pods = await rig.client.list(DEPLOYMENTS, rig.namespace)
    assert len(pods.items) == 2
    with granted(rig.server, rig.namespace, USER, but=("servingruntimes", "list")):
        controller = await rig.start(kubeconfig=rig.server.kubeconfig(USER), workloads=True)
        await rig.apply(isvc("comes", rig.namespace))
        event = await rig.event("comes", "RuntimesUnknown")
        assert event["type"] == "Warning"
        await said(caplog, "cannot list servingruntimes")
        assert "servingruntimes" in controller.not_ready()
        await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "goes")
        await rig.gone("goes")
        assert (await rig.client.list(DEPLOYMENTS, rig.namespace)).items == pods.items
        assert await rig.mesh.aliases() == {}
        allow(rig.server, rig.namespace, USER, SERVING_RUNTIMES, "list")
        await rig.mesh.registered("comes")
        assert controller.not_ready() == ""
        await rig.stop()
