"""Everything at once, from a seed: loads, unloads, deletions, faults, a store that comes and goes.

Whatever happened, the memory stayed within its bound, every Load was answered, and when it is quiet
again the store says exactly what is in memory.
"""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from mesh import registry
from mesh.core.cache_check import validate
from mesh.core.errors import LoadFailed, Unavailable
from mesh.core.types import CopyState, LoadPriority
from mesh.instance.answers import LoadAnswer
from mesh.store.api import Delete
from tests.instance.fakes import MIB, Rig, running, until, with_policy

NAMES = [f"m{n}" for n in range(14)]
CAPACITY = 8 * MIB


class Chaos:
    def __init__(self, rig: Rig, seed: int) -> None:
        self.rig = rig
        self.draw = random.Random(seed)
        self.waiters: list[asyncio.Task[LoadAnswer]] = []
        self.records: dict[str, bytes] = {}  # as routers know them: of deleted models too

    def step(self) -> None:
        draw, rig, name = self.draw, self.rig, self.draw.choice(NAMES)
        match draw.randrange(14):
            case 0 | 1 | 2 | 3 | 4:
                wish = {"priority": draw.choice(list(LoadPriority)), "pin": draw.random() < 0.2}
                if draw.random() < 0.7:
                    wish["record"] = self.records.get(name, b"")
                self.waiters.append(asyncio.create_task(rig.load(name, **wish)))
            case 5:
                record = rig.register(name, pinned=draw.random() < 0.1)
                self.records[name] = registry.encode(record)
                size = draw.choice([1, 1, 2, 3]) * MIB
                if not rig.pod.concerns(name):  # or it would be loaded larger than was predicted
                    rig.runtime.sizes[name] = (size, size - draw.choice([0, 1000]))
            case 6:
                rig.unregister(name)
            case 7:
                fault = draw.choice([LoadFailed("bad"), Unavailable("away"), OSError(28, "full")])
                target = draw.choice([rig.source.faults, rig.runtime.load_faults])
                target.setdefault(name, []).append(fault)
            case 8:
                task = asyncio.create_task(rig.pod.unload(name))
                self.waiters.append(task)  # type: ignore[arg-type]
            case 9:
                if self.waiters:
                    draw.choice(self.waiters).cancel()
            case 10:
                if rig.server.available and draw.random() < 0.3:
                    rig.server.go_away()
                else:
                    rig.server.come_back()
            case 11:
                item = rig.server.get(registry.instance_key(rig.instance.instance_id))
                if item is not None and draw.random() < 0.3:
                    rig.server.expire_lease(item.lease_id)
            case 12:
                rig.pod.lost(name)
            case 13:
                if draw.random() < 0.2:  # an outside hand
                    key = registry.copy_key(name, rig.instance.instance_id)
                    rig.server.apply([Delete(key)])


@pytest.mark.parametrize("seed", range(12))
async def test_chaos_ends_in_order(tmp_path: Path, seed: int) -> None:
    policy = with_policy(load_slots=3)
    async with running(tmp_path, capacity_bytes=CAPACITY, policy=policy) as rig:
        chaos = Chaos(rig, seed)
        for name in NAMES:
            chaos.records[name] = registry.encode(rig.register(name))
        for _ in range(250):
            chaos.step()
            validate(rig.pod.cache)
            for _ in range(chaos.draw.randrange(4)):
                await asyncio.sleep(0)
        rig.server.come_back()
        async with asyncio.timeout(60):
            results = await asyncio.gather(*chaos.waiters, return_exceptions=True)
        errors = [r for r in results if isinstance(r, Exception)]
        assert errors == []
        assert rig.runtime.most_held_bytes <= CAPACITY
        cache = rig.pod.cache
        await until(lambda: all(c.state is CopyState.LOADED for c in cache.copies()))
        validate(cache)
        assert set(rig.pod.servables) == {c.model_id for c in cache.copies()}
        assert rig.runtime.held_bytes == cache.used_bytes
        assert rig.pod.loader.jobs == {}
        assert not any(rig.source.held.values())

        def published() -> set[str]:
            mine = [registry.parse_key(key) for key in rig.server.keys("copies/")]
            return {key.name for key in mine}

        await until(lambda: rig.record() is not None and not rig.instance.publisher.away)
        await rig.instance.membership.audit()
        await until(lambda: rig.record() is not None and published() == set(rig.pod.servables))
        await until(lambda: not rig.pod.claims.unconfirmed)
        registered = {registry.parse_key(key).name for key in rig.server.keys("models/")}
        await until(lambda: set(rig.pod.servables) <= registered)
        await until(lambda: all(rig.copy(n).state is CopyState.LOADED for n in rig.pod.servables))
        assert set(rig.pod.records) == set(rig.pod.servables)
        pinned = {c.model_id for c in cache.copies() if c.pinned}
        await until(lambda: pinned == {n for n in rig.pod.servables if rig.copy(n).pinned})
