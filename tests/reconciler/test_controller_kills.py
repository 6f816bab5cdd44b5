"""A real `mesh controller`, killed with -9 in the middle of its work: the next one ends it."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from mesh.reconciler.kube_resources import INFERENCE_SERVICES, Obj
from mesh.reconciler.plan import FINALIZER
from tests.reconciler.rig import Rig, isvc, runtime, until

pytestmark = [pytest.mark.kube, pytest.mark.etcd]

SERVICES = 30
PROJECT = Path(__file__).parents[2]


def end_of(log: Path) -> str:
    return log.read_text()[-3_000:]


@asynccontextmanager
async def controller(rig: Rig, log: Path) -> AsyncIterator[None]:
    """Runs until the block ends, and is killed with -9 then, whatever it is about."""
    command = [sys.executable, "-m", "mesh.cli", "controller", "--no-workloads"]
    command += ["--kubeconfig", str(rig.server.kubeconfig("admin"))]
    command += ["--namespace", rig.namespace, "--etcd", rig.etcd.endpoint]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MESH_")}
    with log.open("a") as out:
        process = await asyncio.create_subprocess_exec(
            *command, stdout=out, stderr=out, cwd=PROJECT, env=environment
        )
    try:
        yield
        assert process.returncode is None, end_of(log)
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def registered(rig: Rig, at_least: int) -> None:
    async def look() -> bool:
        return len(await rig.mesh.aliases()) >= at_least

    await until(look, what=f"{at_least} registrations")


async def unregistered(rig: Rig, at_most: int) -> None:
    async def look() -> bool:
        return len(await rig.mesh.aliases()) <= at_most

    await until(look, what=f"{at_most} registrations")


async def all_services(rig: Rig) -> dict[str, Obj]:
    listing = await rig.client.list(INFERENCE_SERVICES, rig.namespace)
    return {one["metadata"]["name"]: one for one in listing.items}


async def test_killed_while_services_come_change_and_go(rig: Rig, tmp_path: Path) -> None:
    log = tmp_path / "controller.log"
    await rig.mesh.instance()
    await rig.apply(runtime("mesh-1.x", rig.namespace))
    names = [f"m{number:02}" for number in range(SERVICES)]
    kept, changed, gone = names[:10], names[10:20], names[20:]
    await asyncio.gather(*(rig.apply(isvc(name, rig.namespace)) for name in names))
    async with controller(rig, log):
        await registered(rig, SERVICES // 3)
    assert len(await rig.mesh.aliases()) < SERVICES, "killed too late to matter"
    async with controller(rig, log):
        await registered(rig, SERVICES)
        for name in names:
            await rig.mesh.load(name)
        before = await rig.mesh.aliases()
        await asyncio.gather(
            *(rig.apply(isvc(one, rig.namespace, uri="s3://models/two")) for one in changed),
            *(rig.client.delete(INFERENCE_SERVICES, rig.namespace, one) for one in gone),
        )
        await unregistered(rig, SERVICES - 3)
    async with controller(rig, log):
        await unregistered(rig, len(kept) + len(changed))

        async def told() -> bool:
            there = await all_services(rig)
            return set(there) == {*kept, *changed} and all(
                (one.get("status") or {}).get("observedGeneration") == one["metadata"]["generation"]
                for one in there.values()
            )

        await until(told, what="the status of all, and no more of those that are gone")
        after = await rig.mesh.aliases()
    assert set(after) == {*kept, *changed}
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    for name in changed:
        assert after[name].active_model_id == before[name].active_model_id
        assert after[name].target_model_id != before[name].target_model_id
    ids = {one.active_model_id for one in after.values()}
    ids |= {one.target_model_id for one in after.values()}
    assert await rig.mesh.models() == ids  # none leaked, none doubled
    for one in (await all_services(rig)).values():
        assert one["metadata"]["finalizers"] == [FINALIZER]
