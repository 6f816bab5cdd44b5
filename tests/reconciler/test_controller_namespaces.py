"""One controller for many namespaces: each has a registry, a secret and an end of its own."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from mesh.reconciler.kube_resources import (
    DEPLOYMENTS,
    INFERENCE_SERVICES,
    NAMESPACES,
    SECRETS,
    SERVICES,
)
from mesh.reconciler.plan import FINALIZER
from tests.etcd_server import EtcdServer
from tests.kube_server import KubeServer
from tests.reconciler.rig import Rig, isvc, rig_of, runtime, until

pytestmark = [pytest.mark.kube, pytest.mark.etcd]


async def enable(rig: Rig, value: str | None = "true") -> None:
    patch = {"metadata": {"labels": {"modelmesh-enabled": value}}}
    await rig.client.patch(NAMESPACES, None, rig.namespace, patch)


@pytest.fixture
async def one(rig: Rig) -> AsyncIterator[Rig]:
    """A namespace with the label, which goes at the end: others serve all that have it."""
    await enable(rig)
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    yield rig
    await rig.stop()
    await enable(rig, None)


@pytest.fixture
async def other(kube: KubeServer, mesh_etcd: EtcdServer) -> AsyncIterator[Rig]:
    """Another namespace, without the label as yet; ``one``'s controller serves it."""
    async with rig_of(kube, mesh_etcd, kube.create_namespace()) as rig:
        await rig.apply(runtime("mesh-1.x", rig.namespace))
        yield rig
        await enable(rig, None)


async def test_two_namespaces_with_services_of_one_name_keep_apart(one: Rig, other: Rig) -> None:
    await enable(other)
    await one.start(all_namespaces=True)
    for rig, uri in ((one, "s3://models/one"), (other, "s3://models/other")):
        await rig.mesh.instance()
        await rig.apply(isvc("iris", rig.namespace, uri=uri))
    first, second = await one.mesh.registered("iris"), await other.mesh.registered("iris")
    assert first.target_model_id != second.target_model_id
    await one.mesh.load("iris")
    status = await one.ready("iris")
    assert status["url"] == f"grpc://modelmesh-serving.{one.namespace}:8033"
    waiting = (await other.get("iris"))["status"]
    assert waiting["modelStatus"]["states"]["targetModelState"] != "Loaded"
    await one.client.delete(INFERENCE_SERVICES, one.namespace, "iris")
    await one.gone("iris")
    assert await one.mesh.aliases() == {}
    assert set(await other.mesh.aliases()) == {"iris"}


async def test_each_has_its_own_secret_only(one: Rig, other: Rig, tmp_path: Path) -> None:
    await enable(other)
    storage = {"key": "minio", "path": "iris.onnx"}
    secret = {
        "metadata": {"name": "storage-config", "namespace": one.namespace},
        "stringData": {"minio": '{"type": "s3"}'},
    }
    await one.client.create(SECRETS, secret)
    await one.start(all_namespaces=True, storage_config_dir=tmp_path)
    for rig in (one, other):
        await rig.mesh.instance()
        await rig.apply(isvc("iris", rig.namespace, uri="", storage=storage))
        await rig.mesh.registered("iris")
    await other.mesh.fail("iris", "no storage key minio")
    status = await other.status(
        "iris", lambda s: (s.get("modelStatus") or {}).get("lastFailureInfo")
    )
    message = status["modelStatus"]["lastFailureInfo"]["message"]
    assert f"no storage secret 'storage-config' of namespace '{other.namespace}'" in message
    await one.mesh.load("iris")
    await one.ready("iris")
    assert (tmp_path / one.namespace / "minio").read_text() == '{"type": "s3"}'
    assert not (tmp_path / other.namespace / "minio").exists()


async def test_a_namespace_is_served_from_its_label_on_to_its_label_off(
    one: Rig, other: Rig, tmp_path: Path
) -> None:
    await one.start(all_namespaces=True, workloads=True, storage_config_dir=tmp_path)
    await one.apply(isvc("iris", one.namespace))
    await other.apply(isvc("iris", other.namespace))
    await one.mesh.registered("iris")
    await one.idle()
    assert await other.mesh.aliases() == {}
    assert "status" not in await other.get("iris")
    secret = {
        "metadata": {"name": "storage-config", "namespace": other.namespace},
        "stringData": {"minio": '{"type": "s3"}'},
    }
    await other.client.create(SECRETS, secret)
    await enable(other)
    await other.mesh.registered("iris")
    await other.status("iris", lambda s: s.get("conditions"))
    file = tmp_path / other.namespace / "minio"

    async def made() -> bool:
        return len((await other.client.list(DEPLOYMENTS, other.namespace)).items) == 2

    await until(made, what="its Deployments")
    await until(lambda: _is(file.exists()), what="its secret's file")
    await enable(other, "false")

    async def cleared() -> bool:
        found = await other.get("iris")
        left = [
            *(await other.client.list(DEPLOYMENTS, other.namespace)).items,
            *(await other.client.list(SERVICES, other.namespace)).items,
            *(found["metadata"].get("finalizers") or ()),
        ]
        return not (left or found.get("status") or await other.mesh.aliases())

    await until(cleared, what="nothing of ours to be left")
    await until(lambda: _is(not file.exists()), what="its secret's file to go")
    await until(lambda: _is(other.namespace not in controller_meshes(one)), what="its end")
    await enable(other)
    await enable(other, "false")
    await enable(other)
    await other.mesh.registered("iris")
    assert set(await one.mesh.aliases()) == {"iris"}


async def test_a_label_taken_off_while_the_controller_was_away(one: Rig, other: Rig) -> None:
    await enable(other)
    await one.start(all_namespaces=True)
    await other.apply(isvc("iris", other.namespace))
    await other.mesh.registered("iris")
    await one.idle()
    await one.stop()
    await enable(other, None)
    await other.client.delete(INFERENCE_SERVICES, other.namespace, "iris")
    assert FINALIZER in (await other.get("iris"))["metadata"]["finalizers"]
    await one.start(all_namespaces=True)
    await other.gone("iris")
    assert await other.mesh.aliases() == {}


async def test_a_namespace_that_is_deleted_can_go(one: Rig, other: Rig) -> None:
    """Nobody deletes its contents here but the test, which plays the namespace controller."""
    await enable(other)
    await one.start(all_namespaces=True, workloads=True)
    await other.apply(isvc("iris", other.namespace))
    await other.mesh.registered("iris")
    await one.idle()
    await other.client.delete(NAMESPACES, None, other.namespace)
    await other.client.delete(INFERENCE_SERVICES, other.namespace, "iris")
    await other.gone("iris")

    async def emptied() -> bool:
        return not (await other.client.list(DEPLOYMENTS, other.namespace)).items

    await until(emptied, what="its Deployments to go, and not to come again")
    await until(lambda: _is(other.namespace not in controller_meshes(one)), what="its end")


def controller_meshes(rig: Rig) -> set[str]:
    assert rig.controller is not None
    return set(rig.controller.meshes)


async def _is(value: bool) -> bool:
    return value
