"""Instances replaced one after the other under steady load: no request is lost."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from mesh.core.types import CopyState
from tests.instance.fakes import Rig, until
from tests.router.mesh_rig import MeshRig, mesh

MODELS = [f"m{n}" for n in range(8)]


@asynccontextmanager
async def steady_load(rig: MeshRig, clients: int = 8) -> AsyncIterator[list[str]]:
    """Yields the list of what was answered; a request that fails fails the test."""
    answered: list[str] = []
    stopped = asyncio.Event()

    async def client(number: int) -> None:
        at = number
        while not stopped.is_set():
            name = MODELS[at % len(MODELS)]
            assert await rig.infer(name, float(at), timeout=30) == [2.0 * at]
            answered.append(name)
            at += 1

    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(number))
        try:
            yield answered
        finally:
            stopped.set()


async def leave(rig: MeshRig, pod: Rig) -> None:
    rig.pods.remove(pod)
    await pod.instance.drain()


async def goes_on(answered: list[str]) -> None:
    seen = len(answered)
    await until(lambda: len(answered) >= seen + 20)


async def test_a_rolling_replacement_of_all_instances_loses_no_request(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2) as rig:
        for name in MODELS:
            await rig.register(name)
        async with steady_load(rig) as answered:
            await until(lambda: set(answered) == set(MODELS))
            for old in list(rig.pods):
                await rig.add_pod()
                await goes_on(answered)
                held = old.pod.servables.keys()
                assert held
                await leave(rig, old)
                await goes_on(answered)
        assert all(len(rig.holders(name)) >= 1 for name in MODELS)


async def test_copies_are_there_before_the_last_holder_has_gone(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        for name in MODELS:
            await rig.register(name)
            await rig.infer(name, 1.0)
        old, new = rig.pods[0], await rig.add_pod()
        await until(lambda: new.instance.instance_id in old.instance.neighbours.view.instances)
        await until(lambda: all(old.copy(n).state is CopyState.LOADED for n in MODELS))
        await leave(rig, old)
        assert new.pod.servables.keys() == set(MODELS)
        before = {name: rig.loads_of(name) for name in MODELS}
        for name in MODELS:
            assert await rig.infer(name, 2.0) == [4.0]
        assert {name: rig.loads_of(name) for name in MODELS} == before


async def test_requests_wait_for_the_next_instance_when_the_last_one_leaves(
    tmp_path: Path,
) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m0")
        await rig.infer("m0", 1.0)
        await leave(rig, rig.pods[0])
        waiting = asyncio.create_task(rig.infer("m0", 2.0, timeout=30))
        await until(lambda: rig.routers[0].loads.waiting)
        await rig.add_pod()
        assert await waiting == [4.0]
