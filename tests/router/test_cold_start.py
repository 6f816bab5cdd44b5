"""All instances are new and empty: what requests wait for is loaded first, a few at once."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from pathlib import Path

from tests.instance.fakes import MIB, Rig, until
from tests.router.mesh_rig import POLICY, mesh

# Loads ahead of requests are looked for all the time, but for the first two seconds.
EAGER = replace(POLICY, leader_sweep_ms=20, proactive_quiet_ms=2_000, proactive_sweep_ms=20)


async def test_awaited_loads_ramp_up_within_the_slots_and_the_rest_comes_after_them(
    tmp_path: Path,
) -> None:
    others, awaited = [f"used-{n}" for n in range(4)], [f"awaited-{n}" for n in range(8)]
    async with mesh(tmp_path, pods=0, policy=EAGER) as rig:
        (router,) = rig.routers
        now_ms = time.time_ns() // 1_000_000
        for ago_ms, name in enumerate([*others, *awaited]):  # the others were used last
            await rig.register(name, size_bytes_stated=MIB, last_used_at_ms=now_ms - ago_ms)
        answers = [asyncio.create_task(rig.infer(name, 1.0)) for name in awaited]
        await until(lambda: router.loads.waiting == len(awaited))
        pod = Rig(tmp_path, store=rig.store.peer(), capacity_bytes=20 * MIB)
        runtime, slots = pod.runtime, pod.policy.load_slots
        runtime.load_gates = {name: threading.Event() for name in awaited}
        rig.pods.append(pod)
        await pod.start()

        await until(lambda: len(runtime.loading) == slots)
        quiet_until_s = asyncio.get_running_loop().time() + EAGER.proactive_quiet_ms / 1_000
        await until(lambda: asyncio.get_running_loop().time() > quiet_until_s)
        sweeps = router.leader.sweeps_total
        await until(lambda: router.leader.sweeps_total >= sweeps + 3)
        assert len(runtime.loading) == slots

        for done in range(len(awaited)):
            runtime.load_gates[runtime.loading[done]].set()
            await until(lambda done=done: len(runtime.loaded) > done)
            assert len(runtime.loading) - len(runtime.loaded) <= slots
        assert await asyncio.gather(*answers) == [[2.0]] * len(awaited)
        await until(lambda: len(runtime.loaded) == len(awaited) + len(others))
        assert set(runtime.loading[: len(awaited)]) == set(awaited)
        assert set(runtime.loading[len(awaited) :]) == set(others)
