"""More models than memory: requests keep being answered while copies come and go."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

from tests.instance.fakes import MIB
from tests.router.mesh_rig import mesh


async def test_no_request_fails_while_models_push_each_other_out(tmp_path: Path) -> None:
    chance = random.Random(7)
    async with mesh(tmp_path, pods=0, routers=2) as rig:
        for _ in range(2):
            await rig.add_pod(capacity_bytes=6 * MIB)
        names = [f"m{at}" for at in range(30)]
        for name in names:
            await rig.register(name, size_bytes_stated=MIB)

        async def client(number: int) -> None:
            for _ in range(40):
                # Mostly a few, now and then any: hits, misses and evictions side by side.
                name = chance.choice(names[:4] if chance.random() < 0.6 else names)
                assert await rig.infer(name, 1.0, router=number % 2) == [2.0], name

        await asyncio.gather(*(client(number) for number in range(8)))
        loads = sum(rig.loads_of(name) for name in names)
        assert loads > len(names), "nothing was pushed out: the test tests nothing"
        for pod in rig.pods:
            assert pod.runtime.most_held_bytes <= 6 * MIB
        for router in rig.routers:
            assert router.dispatcher.inflight == 0
            assert router.loads.waiting == 0
