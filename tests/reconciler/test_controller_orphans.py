"""What lost its resource while nobody watched goes; what belongs to others stays."""

from __future__ import annotations

import pytest

from mesh.catalog import Catalog
from mesh.core.view import ClusterView
from mesh.manifest import parse_resource
from mesh.reconciler.kube_resources import INFERENCE_SERVICES
from mesh.reconciler.plan import FINALIZER
from tests.reconciler.rig import Rig, isvc, now_ms, runtime, until

pytestmark = [pytest.mark.kube, pytest.mark.etcd]

NO_FINALIZERS = {"metadata": {"finalizers": []}}


async def only(rig: Rig, *names: str) -> None:
    async def look() -> bool:
        return set(await rig.mesh.aliases()) == set(names)

    await until(look, what=f"only {names} in the registry")


async def by_hand(rig: Rig, name: str) -> None:
    """As `mesh apply` writes it: nobody's resource."""
    applied = parse_resource(isvc(name, rig.namespace), now_ms=now_ms())
    await Catalog(rig.mesh.store, ClusterView(), now_ms=now_ms).apply(applied)


async def test_a_resource_removed_by_force_while_the_controller_was_off(rig: Rig) -> None:
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("lost", rig.namespace))
    await rig.apply(isvc("held", rig.namespace))
    await by_hand(rig, "by-hand")
    await rig.start()
    await rig.mesh.registered("lost")
    await rig.mesh.registered("held")
    await rig.idle()
    await rig.stop()
    await rig.client.patch(INFERENCE_SERVICES, rig.namespace, "lost", NO_FINALIZERS)
    await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "lost")
    await rig.gone("lost")
    assert "lost" in await rig.mesh.aliases()
    await rig.start()
    await only(rig, "held", "by-hand")
    assert len(await rig.mesh.models()) == 2


async def test_a_resource_removed_by_force_under_its_eyes(rig: Rig) -> None:
    await rig.start()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("lost", rig.namespace))
    await rig.mesh.registered("lost")
    await rig.idle()
    await rig.client.patch(INFERENCE_SERVICES, rig.namespace, "lost", NO_FINALIZERS)
    await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "lost")
    # The controller may have put it back in between, and then lets go of it by itself.
    await rig.gone("lost")
    await only(rig)
    assert await rig.mesh.models() == set()


async def test_another_deployment_mode_releases_it(rig: Rig) -> None:
    await rig.start()
    await rig.mesh.instance()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace))
    await rig.mesh.registered("iris")
    await rig.mesh.load("iris")
    await rig.ready("iris")
    patch = {"metadata": {"annotations": {"serving.kserve.io/deploymentMode": None}}}
    await rig.client.patch(INFERENCE_SERVICES, rig.namespace, "iris", patch)

    async def released() -> bool:
        return FINALIZER not in ((await rig.get("iris"))["metadata"].get("finalizers") or ())

    await until(released, what="the finalizer to go")
    await only(rig)
    assert not (await rig.get("iris")).get("status")  # it would go on saying Ready
    await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "iris")
    await rig.gone("iris")
