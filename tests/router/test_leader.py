"""What the elected leader does about pins, minimums, free memory and what was left behind."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mesh import registry
from mesh.core.types import CopyRecord, CopyState, FailureRecord
from mesh.store.api import Put
from router.process import Router
from tests.instance.fakes import MIB, Rig, until
from tests.router.mesh_rig import POLICY, MeshRig, mesh

# A sweep by itself comes once: what happens after it, happens because of what has changed.
SWEEPS_ONCE = replace(POLICY, leader_sweep_ms=3_600_000)
AHEAD_AT_ONCE = replace(POLICY, proactive_quiet_ms=0, proactive_sweep_ms=50)


def leader(rig: MeshRig) -> Router:
    return next(router for router in rig.routers if router.election.is_leader)


def pinned(rig: MeshRig, model_id: str) -> list[Rig]:
    """Where the store says that it is pinned."""
    found = ((pod, pod.copy(model_id)) for pod in rig.pods)
    return [pod for pod, copy in found if copy is not None and copy.pinned]


def told(rig: MeshRig, kind: str) -> list[tuple[str, str]]:
    decisions = leader(rig).decisions.decisions.recent(1_000)
    return [(d.reason, d.model_id) for d in reversed(decisions) if d.kind == kind]


async def steady(rig: MeshRig, condition: Callable[[], object]) -> None:
    """It holds, and still does when the leader has looked twice more."""
    await until(condition)
    sweeps = leader(rig).leader.sweeps_total
    await until(lambda: leader(rig).leader.sweeps_total >= sweeps + 2)
    assert condition()


async def test_a_pinned_model_gets_exactly_one_pinned_copy(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=3, routers=2) as rig:
        await rig.register("m", pinned=True)
        await steady(rig, lambda: len(pinned(rig, "m")) == 1)
        assert rig.loads_of("m") == 1
        assert told(rig, "pin")[0] == ("pinned", "m")


async def test_a_model_that_is_pinned_later_is_pinned_where_it_is(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=3) as rig:
        await rig.register("m")
        await rig.infer("m", 1.0)
        (holder,) = rig.holders("m")
        await rig.register("m", pinned=True)
        await steady(rig, lambda: pinned(rig, "m") == [holder])
        assert rig.loads_of("m") == 1


async def test_of_two_pinned_copies_one_goes(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2) as rig:
        await rig.register("m", pinned=True)
        await until(lambda: len(pinned(rig, "m")) == 1)
        (first,) = pinned(rig, "m")
        other = next(pod for pod in rig.pods if pod is not first)
        await other.load("m", pin=True)
        await until(lambda: told(rig, "unload"))
        await steady(rig, lambda: pinned(rig, "m") == [first])
        assert told(rig, "unload") == [("surplus_pin", "m")]


async def test_a_new_instance_is_used_at_once(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=1, policy=SWEEPS_ONCE) as rig:
        await rig.register("m", min_copies=2)
        lead = leader(rig).leader
        await until(lambda: rig.holders("m"))
        pod = await rig.add_pod()
        await until(lambda: pod in rig.holders("m"))
        await until(lambda: lead.swept_with == {p.instance.instance_id for p in rig.pods})


async def test_a_copy_that_changes_while_the_next_one_is_claimed_delays_nothing(
    tmp_path: Path,
) -> None:
    """The claim is told that another one was first: that is no refusal of the instance."""
    async with mesh(tmp_path, pods=2, policy=SWEEPS_ONCE) as rig:
        await until(lambda: len(leader(rig).leader.swept_with) == 2)
        await rig.register("m")
        await rig.infer("m", 1.0)
        (first,) = rig.holders("m")
        (other,) = (pod for pod in rig.pods if pod is not first)
        claim = other.pod.claims.claim

        async def changed_before(wish: Any, policy: Any) -> Any:
            other.pod.claims.claim = claim
            record = replace(first.copy("m"), size_bytes=2 * MIB)
            rig.server.apply([Put(registry.key_of(record), registry.encode(record))])
            return await claim(wish, policy)

        other.pod.claims.claim = changed_before
        await rig.register("m", min_copies=2)
        await until(lambda: len(rig.holders("m")) == 2)


async def test_what_a_draining_instance_had_pinned_is_pinned_elsewhere_at_once(
    tmp_path: Path,
) -> None:
    async with mesh(tmp_path, pods=2, policy=SWEEPS_ONCE) as rig:
        await rig.register("m", pinned=True)
        await until(lambda: len(pinned(rig, "m")) == 1)
        (first,) = pinned(rig, "m")
        other = next(pod for pod in rig.pods if pod is not first)
        await first.instance.drain()
        await until(lambda: pinned(rig, "m") == [other])


async def test_a_shortfall_is_told_with_its_reason_and_ends(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=1) as rig:
        await rig.register("m", min_copies=2)
        lead = leader(rig).leader
        await until(lambda: rig.holders("m") and lead.shortfalls)
        await until(lambda: lead.copies_lacking == 1)
        (short,) = lead.shortfalls
        assert (short.model_id, short.missing) == ("m", 1)
        assert (short.reason, "m") in told(rig, "minimum")
        await rig.add_pod()
        await until(lambda: lead.copies_lacking == 0)
        assert lead.shortfalls == ()


async def test_a_load_that_is_refused_is_not_asked_for_at_every_look(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=1, policy=replace(POLICY, leader_sweep_ms=20)) as rig:
        pod = rig.pods[0]
        pod.runtime.sizes = {"large": (9 * MIB, 9 * MIB), "m": (2 * MIB, 2 * MIB)}
        await rig.register("large", pinned=True)
        await until(lambda: pinned(rig, "large"))
        # Its copies cannot be evicted, and the advert does not say so.
        await rig.register("m", pinned=True)
        lead = leader(rig).leader
        sweeps = lead.sweeps_total
        await until(lambda: lead.sweeps_total >= sweeps + 30)
        asked = [m for m in told(rig, "pin") if m == ("pinned", "m")]
        assert 1 <= len(asked) <= 12  # 20, 40, 80 ... ms apart
        assert "m" not in pod.pod.servables


async def test_free_memory_takes_the_models_used_last(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=1, policy=AHEAD_AT_ONCE) as rig:
        now_ms = rig.pods[0].instance.clock.now_ms()
        for n in range(12):  # of a MiB each: eight leave an eighth of ten free
            await rig.register(f"m{n:02}", size_bytes_stated=MIB, last_used_at_ms=now_ms - n)
        await rig.register("never", size_bytes_stated=MIB)
        await steady(rig, lambda: len(rig.pods[0].pod.servables) == 8)
        assert sorted(rig.pods[0].pod.servables) == [f"m{n:02}" for n in range(8)]
        assert ("recently_used", "m00") in told(rig, "proactive")
        assert rig.pods[0].runtime.unloaded == []


async def test_a_new_leader_loads_nothing_ahead_at_first(tmp_path: Path) -> None:
    policy = replace(AHEAD_AT_ONCE, proactive_quiet_ms=3_600_000)
    async with mesh(tmp_path, pods=1, policy=policy) as rig:
        now_ms = rig.pods[0].instance.clock.now_ms()
        await rig.register("m", last_used_at_ms=now_ms)
        await steady(rig, lambda: True)
        assert rig.loads_of("m") == 0
        leader(rig).leader.use_policy(AHEAD_AT_ONCE)  # the pause that has begun is kept
        await steady(rig, lambda: True)
        assert rig.loads_of("m") == 0


async def test_loads_ahead_are_so_many_at_once(tmp_path: Path) -> None:
    policy = replace(AHEAD_AT_ONCE, proactive_loads_max=2)
    async with mesh(tmp_path, pods=4, policy=policy) as rig:
        gate = asyncio.Event()
        names = [f"m{n}" for n in range(8)]
        for pod in rig.pods:
            pod.source.gates.update(dict.fromkeys(names, gate))
        now_ms = rig.pods[0].instance.clock.now_ms()
        for n, name in enumerate(names):
            await rig.register(name, size_bytes_stated=MIB, last_used_at_ms=now_ms - n)
        await steady(rig, lambda: sum(len(pod.source.fetched) for pod in rig.pods) == 2)
        gate.set()
        await until(lambda: all(rig.holders(name) for name in names))


async def test_copies_of_a_model_that_was_deleted_while_nobody_led_are_unloaded(
    tmp_path: Path,
) -> None:
    async with mesh(tmp_path, routers=0, pods=1) as rig:
        pod = rig.pods[0]
        pod.register("m")
        await pod.load("m")
        # Its watch of the models is late: the instance still believes in it.
        pod.instance.membership._model_event = lambda event: None
        pod.unregister("m")
        await rig.add_router()
        await until(lambda: "m" not in pod.pod.servables)
        assert told(rig, "repair") == [("orphan_copy", "m")]


async def test_the_next_leader_goes_on_without_doing_it_again(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2, routers=2) as rig:
        await rig.register("m", min_copies=2)
        await rig.register("p", pinned=True)
        await until(lambda: len(rig.holders("m")) == 2 and pinned(rig, "p"))
        first = leader(rig)
        await first.drain()
        rig.routers.remove(first)
        await until(lambda: rig.routers[0].election.is_leader)
        await steady(rig, lambda: len(rig.holders("m")) == 2 and len(pinned(rig, "p")) == 1)
        assert (rig.loads_of("m"), rig.loads_of("p")) == (2, 1)


async def test_a_copy_without_an_instance_is_deleted(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        await rig.infer("m", 1.0)
        key = registry.copy_key("m", "ghost")
        record = CopyRecord("m", "ghost", CopyState.LOADED, size_bytes=1, loaded_at_ms=1)
        rig.server.apply([Put(key, registry.encode(record))])
        await until(lambda: rig.server.get(key) is None)
        assert told(rig, "repair") == [("copy_without_instance", "m")]
        assert rig.holders("m")
        assert await rig.infer("m", 1.0) == [2.0]


async def test_expired_failures_are_swept(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        await rig.register("m")
        key = registry.failure_key("m", "gone")
        rig.server.apply(
            [Put(key, registry.encode(FailureRecord("m", "gone", "INTERNAL", "", 1, 2)))]
        )
        await until(lambda: rig.server.get(key) is None)
