"""Somebody else who writes the same object all the time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mesh.reconciler.kube import ApiNotFound
from mesh.reconciler.kube_resources import INFERENCE_SERVICES
from tests.reconciler.rig import Rig, isvc, runtime, until

pytestmark = [pytest.mark.kube, pytest.mark.etcd]


@asynccontextmanager
async def another_writer(rig: Rig, name: str) -> AsyncIterator[None]:
    """Patches an annotation again and again, without a pause."""

    async def write() -> None:
        number = 0
        while True:
            number += 1
            patch = {"metadata": {"annotations": {"example.test/tick": str(number)}}}
            try:
                await rig.client.patch(INFERENCE_SERVICES, rig.namespace, name, patch)
            except ApiNotFound:
                return

    writing = asyncio.create_task(write())
    try:
        yield
    finally:
        writing.cancel()
        result = (await asyncio.gather(writing, return_exceptions=True))[0]
        assert result is None or isinstance(result, asyncio.CancelledError), result


async def test_it_gets_through_a_storm_of_other_writes(rig: Rig) -> None:
    await rig.start()
    await rig.mesh.instance()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    await rig.apply(isvc("iris", rig.namespace))
    async with another_writer(rig, "iris"):
        alias = await rig.mesh.registered("iris")
        await rig.mesh.load("iris")
        status = await rig.ready("iris")
        await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "iris")
        await rig.gone("iris")
    assert status["modelStatus"]["copies"]["totalCopies"] == 1
    assert any(code == 409 for _, _, code in rig.calls), "no conflict: nothing was tried"
    assert await rig.mesh.aliases() == {} and alias.target_model_id not in await rig.mesh.models()


async def test_others_finalizers_and_annotations_stay(rig: Rig) -> None:
    await rig.start()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    made = isvc("iris", rig.namespace)
    made["metadata"]["finalizers"] = ["example.test/theirs"]
    await rig.apply(made)
    async with another_writer(rig, "iris"):
        await rig.mesh.registered("iris")
    metadata = (await rig.get("iris"))["metadata"]
    assert metadata["finalizers"] == ["example.test/theirs", "mesh.serving/registry"]
    assert "example.test/tick" in metadata["annotations"]
    await rig.client.delete(INFERENCE_SERVICES, rig.namespace, "iris")

    async def released() -> bool:
        return (await rig.get("iris"))["metadata"]["finalizers"] == ["example.test/theirs"]

    await until(released, what="our finalizer to go")
    assert await rig.mesh.aliases() == {}
    patch = {"metadata": {"finalizers": []}}
    await rig.client.patch(INFERENCE_SERVICES, rig.namespace, "iris", patch)
    await rig.gone("iris")
