"""A changed spec: the name moves when the new model has loaded, and only then."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path

from mesh import registry
from mesh.core.errors import LoadFailed
from tests.instance.fakes import until
from tests.router.mesh_rig import POLICY, MeshRig, mesh

SWEEPS_ONCE = replace(POLICY, leader_sweep_ms=3_600_000)


def active(rig: MeshRig, name: str) -> str:
    item = rig.server.get(registry.vmodel_key(name))
    return registry.decode_vmodel(name, item.value).active_model_id


async def test_the_old_model_serves_until_the_new_one_has_loaded(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        old = await rig.apply("iris", "fake://1")
        await rig.infer("iris", 1.0)
        pod = rig.pods[0]
        gate = asyncio.Event()
        # Whatever its id will be: the next model that is fetched waits.
        pod.source.gates = _GateForOthers(old.model_id, gate)
        new = await rig.apply("iris", "fake://2")
        await until(lambda: new.model_id in pod.source.fetched)
        assert active(rig, "iris") == old.model_id
        assert await rig.infer("iris", 1.0) == [2.0]
        gate.set()
        await until(lambda: active(rig, "iris") == new.model_id)
        assert await rig.infer("iris", 1.0) == [2.0]
        assert pod.runtime.calls[-1][0] == new.model_id
        # The old one was its alias's own: it goes, and its memory with it.
        await until(lambda: old.model_id in pod.runtime.unloaded)
        assert rig.server.get(registry.model_key(old.model_id)) is None


async def test_a_new_spec_that_does_not_load_leaves_the_old_one_serving(tmp_path: Path) -> None:
    async with mesh(tmp_path) as rig:
        old = await rig.apply("iris", "fake://1")
        await rig.infer("iris", 1.0)
        rig.pods[0].runtime.load_faults = _FaultForOthers(old.model_id)
        new = await rig.apply("iris", "fake://broken")

        def failed() -> str:
            return rig.routers[0].view.vmodels["iris"].failed

        await until(failed)
        assert "broken artifact" in failed()
        assert active(rig, "iris") == old.model_id
        assert await rig.infer("iris", 1.0) == [2.0]
        assert rig.loads_of(new.model_id) == 1
        # An older spec again: nothing is loaded, nothing is pending.
        again = await rig.apply("iris", "fake://1")
        assert (again.action, again.model_id) == ("configured", old.model_id)
        assert not failed()
        await until(lambda: rig.server.get(registry.model_key(new.model_id)) is None)
        assert await rig.infer("iris", 1.0) == [2.0]


async def test_no_request_fails_during_a_switch(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2) as rig:
        await rig.apply("iris", "fake://1")
        await rig.infer("iris", 1.0)
        stop = asyncio.Event()
        answered = 0

        async def ask() -> None:
            nonlocal answered
            while not stop.is_set():
                assert await rig.infer("iris", 1.0) == [2.0]
                answered += 1

        clients = [asyncio.create_task(ask()) for _ in range(4)]
        for version in (2, 3, 4):
            new = await rig.apply("iris", f"fake://{version}")
            await until(lambda: active(rig, "iris") == new.model_id)  # noqa: B023
            before = answered
            await until(lambda: answered > before + 5)  # noqa: B023
        stop.set()
        await asyncio.gather(*clients)


async def test_a_minimum_of_copies_is_kept(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=2) as rig:
        applied = await rig.apply("iris", "fake://1", minReplicas=2)
        await until(lambda: len(rig.holders(applied.model_id)) == 2)


async def test_minimum_copies_do_not_wait_for_the_next_sweep(tmp_path: Path) -> None:
    async with mesh(tmp_path, pods=3, policy=SWEEPS_ONCE) as rig:
        leader = rig.routers[0].leader
        await until(lambda: len(leader.swept_with) == 3)
        sweeps = leader.sweeps_total
        applied = await rig.apply("iris", "fake://1", minReplicas=3)
        await until(lambda: len(rig.holders(applied.model_id)) == 3)
        await rig.register("kept", pinned=True)
        await until(lambda: rig.holders("kept"))
        assert leader.sweeps_total == sweeps


async def test_what_changes_cause_between_two_sweeps_has_a_bound(tmp_path: Path) -> None:
    policy = replace(SWEEPS_ONCE, repair_loads_max=1)
    async with mesh(tmp_path, policy=policy) as rig:
        leader = rig.routers[0].leader
        await until(lambda: leader.swept_with)
        await rig.register("first", pinned=True)
        await until(lambda: rig.holders("first"))
        await rig.register("second", pinned=True)
        leader.wake(frozenset({"second"}))
        leader.fill()
        assert rig.routers[0].view.pending_of("second") == ()
        await leader.repair()  # a sweep sees to what is left
        await until(lambda: rig.holders("second"))


async def test_the_leader_is_replaced(tmp_path: Path) -> None:
    async with mesh(tmp_path, routers=2) as rig:
        await until(lambda: any(r.election.is_leader for r in rig.routers))
        first = next(r for r in rig.routers if r.election.is_leader)
        other = next(at for at, r in enumerate(rig.routers) if r is not first)
        await rig.apply("iris", "fake://1", router=other)
        await rig.infer("iris", 1.0, router=other)
        await first.drain()
        new = await rig.apply("iris", "fake://2", router=other)
        await until(lambda: active(rig, "iris") == new.model_id)


class _GateForOthers(dict):  # type: ignore[type-arg]
    """A gate for every model but one."""

    def __init__(self, but: str, gate: asyncio.Event) -> None:
        super().__init__()
        self.but = but
        self.gate = gate

    def __contains__(self, name: object) -> bool:
        return name != self.but

    def __getitem__(self, name: str) -> asyncio.Event:
        return self.gate

    def values(self):  # type: ignore[no-untyped-def]
        return [self.gate]


class _FaultForOthers(dict):  # type: ignore[type-arg]
    """Every load fails but that of one model."""

    def __init__(self, but: str) -> None:
        super().__init__()
        self.but = but

    def get(self, name: str, default: object = None) -> list[Exception] | None:
        return None if name == self.but else [LoadFailed("broken artifact")]

    def __getitem__(self, name: str) -> list[Exception]:
        return [LoadFailed("broken artifact")]
