"""The loop that measures copies and carries out what is decided about their number."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mesh.core.policy import Policy
from mesh.core.scaling import decider
from mesh.core.types import CopyState, ModelRecord
from mesh.core.usage import Use
from mesh.core.view import ClusterView
from mesh.decision_log import DecisionLog
from mesh.instance.scaler import Scaler
from mesh.instance.servable import Statistics
from mesh.store.api import StoreUnavailable
from tests.core.cluster import copy, instance, model
from tests.instance.fakes import until
from tests.instance.test_drain import several

START = 1_000_000_000
MINUTE = 60_000
POLICY = Policy(default_model_size_bytes=10)


class Others:
    """The other instances, as this one sees them: what is asked of them is written down."""

    def __init__(self) -> None:
        self.view = ClusterView()
        self.stored: dict[str, list[Any]] = {}  # model id -> copies in the store
        self.reads: list[str] = []
        self.loads: list[tuple[str, str]] = []
        self.unloads: list[tuple[str, str, str]] = []
        self.refuse = False
        self.away = False
        self.gate: asyncio.Event | None = None

    async def read_copies(self, model_id: str) -> ClusterView:
        if self.away:
            raise StoreUnavailable("the store is away")
        self.reads.append(model_id)
        for known in self.view.copies_of(model_id):
            self.view.delete_copy(model_id, known.instance_id)
        for there in self.stored.get(model_id, ()):
            self.view.put_copy(there)
        return self.view

    async def load_on(self, instance_id: str, record: ModelRecord, **about: Any) -> bool:
        self.loads.append((record.model_id, instance_id))
        if self.gate is not None:
            await self.gate.wait()
        if not self.refuse:
            self.stored[record.model_id].append(copy(record.model_id, instance_id))
        return not self.refuse

    async def unload_on(self, instance_id: str, model_id: str, reason: str) -> bool:
        self.unloads.append((model_id, instance_id, reason))
        self.stored[model_id] = [c for c in self.stored[model_id] if c.instance_id != instance_id]
        return True


class World:
    """One instance ``me`` among five, with a clock that is set."""

    def __init__(self) -> None:
        self.now = START
        self.others = Others()
        self.pod = SimpleNamespace(
            instance_id="me", servables={}, records={}, cache=SimpleNamespace(draining=False)
        )
        self.log = DecisionLog(now_ms=lambda: self.now)
        clock = SimpleNamespace(now_ms=lambda: self.now)
        self.scaler = Scaler(self.pod, self.others, POLICY, clock, self.log)  # type: ignore[arg-type]
        for name in ("me", "a", "b", "c", "d"):
            self.others.view.put_instance(instance(name))

    def hold(self, model_id: str = "m", *elsewhere: str, **fields: Any) -> Any:
        """A copy here, the oldest, and others that came after it."""
        servable = SimpleNamespace(use=Use(START), statistics=Statistics(), max_concurrency=10)
        self.pod.servables[model_id] = servable
        self.pod.records[model_id] = model(model_id, **fields)
        self.others.stored[model_id] = [
            copy(model_id, name, claimed_at_ms=n) for n, name in enumerate(("me", *elsewhere))
        ]
        return servable

    async def after(self, ms: int = POLICY.scale_sweep_ms) -> None:
        """The next sweep, when that time has passed, and all that it began."""
        self.now += ms
        await self.scaler.sweep()
        while self.scaler._changing:
            await asyncio.gather(*self.scaler._changing.values())
            await asyncio.sleep(0)

    def use(self, servable: Any, requests: int) -> None:
        servable.use.uses += requests
        servable.use.last_used_at_ms = self.now

    def told(self, kind: str) -> list[tuple[str, str]]:
        found = self.log.decisions.recent(100)
        return [(d.reason, d.instance_id) for d in reversed(found) if d.kind == kind]


@pytest.fixture
def world() -> World:
    return World()


async def test_a_busy_copy_gets_company_once(world: World) -> None:
    servable = world.hold()
    await world.after()
    world.use(servable, 400)  # in ten seconds: 2,400 a minute
    await world.after()
    ((model_id, chosen),) = world.others.loads
    assert model_id == "m"
    assert chosen in "abcd"
    assert world.told("scale_up") == [("rate", chosen)]
    world.use(servable, 400)
    await world.after()
    assert len(world.others.loads) == 1  # its effect has to be seen first


async def test_the_first_look_at_a_copy_is_no_rate(world: World) -> None:
    servable = world.hold()
    servable.use.uses = 1_000_000
    await world.after()
    await world.after()
    assert world.others.reads == []


async def test_copies_at_rest_are_not_read_from_the_store(world: World) -> None:
    servables = [world.hold(f"m{n}") for n in range(100)]
    await world.after()
    for servable in servables:
        world.use(servable, 1)
    for _ in range(5):
        await world.after()
    assert world.others.reads == []


async def test_one_sweep_reads_so_many_and_the_busiest_first(world: World) -> None:
    world.scaler.use_policy(replace(POLICY, scale_reads_max=2))
    servables = {f"m{n}": world.hold(f"m{n}") for n in range(5)}
    await world.after()
    for n, servable in enumerate(servables.values()):
        world.use(servable, 1_000 * (n + 1))
    await world.after()
    assert world.others.reads[:2] == ["m4", "m3"]
    assert {model_id for model_id, _ in world.others.loads} == {"m4", "m3"}


async def test_every_copy_is_read_now_and_then_all_the_same(world: World) -> None:
    for n in range(5):
        world.hold(f"m{n}", "a", "b", "c")  # somebody else made those
    await world.after()
    await world.after(POLICY.second_copy_max_age_ms)
    for _ in range(3):
        await world.after()
    assert set(world.others.reads) == {f"m{n}" for n in range(5)}
    assert {model_id for model_id, _, _ in world.others.unloads} == {f"m{n}" for n in range(5)}


async def test_slow_requests_count_by_the_time_that_they_take(world: World) -> None:
    servable = world.hold()
    await world.after()
    world.use(servable, 5)
    servable.statistics.success_count = 5
    servable.statistics.success_ns = int(9.5 * POLICY.scale_sweep_ms * 1e6)
    await world.after()
    assert world.told("scale_up")[0][0] == "concurrency"


async def test_requests_that_wait_at_two_looks_count_though_none_was_answered(
    world: World,
) -> None:
    servable = world.hold()
    await world.after()
    servable.use.in_flight = 30
    await world.after()
    assert world.others.loads == []  # a burst, so far
    await world.after()
    assert world.told("scale_up")[0][0] == "queue"


async def test_a_model_in_regular_use_gets_a_second_copy(world: World) -> None:
    servable = world.hold()
    await world.after()
    world.use(servable, 1)
    await world.after()
    await world.after(10 * MINUTE)
    world.use(servable, 1)
    assert world.others.loads == []
    await world.after(POLICY.scale_sweep_ms)
    assert world.told("scale_up")[0][0] == "second_copy"


async def test_who_does_not_decide_leaves_it_to_who_does(world: World) -> None:
    servable = world.hold()
    world.others.stored["m"].append(copy("m", "a", claimed_at_ms=-1))
    await world.after()
    for _ in range(10):
        world.use(servable, 400)
        await world.after()
    assert world.others.loads == []
    assert world.others.reads == ["m"]  # and need not read it again while that one is there
    world.others.stored["m"].pop()
    world.others.view.delete_instance("a")
    world.use(servable, 4_000)
    await world.after(MINUTE)
    assert [m for m, _ in world.others.loads] == ["m"]


async def test_copies_that_nobody_needs_go_one_at_a_time(world: World) -> None:
    servable = world.hold("m", "a", "b", "c")
    await world.after()
    world.use(servable, 400)
    await world.after()  # busy: it is read
    assert world.others.loads == []  # a third of five instances is two: there are more already
    for _ in range(40):
        await world.after()
    assert [where for _, where, _ in world.others.unloads] == ["c", "b"]
    assert world.told("scale_down") == [("low_rate", "c"), ("low_rate", "b")]


async def test_a_refused_load_is_not_asked_for_at_every_look(world: World) -> None:
    world.others.refuse = True
    servable = world.hold()
    await world.after()
    for _ in range(30):
        world.use(servable, 400)
        await world.after()
    assert 2 <= len(world.others.loads) <= 5  # less often each time
    world.others.refuse = False
    for _ in range(40):
        world.use(servable, 400)
        await world.after()
    assert len(world.others.stored["m"]) == 2


async def test_a_copy_that_cannot_be_added_is_told_once_with_the_reason(world: World) -> None:
    servable = world.hold("m", "a")  # two of five are a share of 0.34 and more
    await world.after()
    for _ in range(20):
        world.use(servable, 400)
        await world.after()
    assert world.others.loads == []
    assert world.told("keep") == [("copies_share", "")]
    await world.after(POLICY.second_copy_max_age_ms)  # at rest: content
    for _ in range(20):
        world.use(servable, 400)
        await world.after()
    assert world.told("keep") == [("copies_share", "")] * 2


async def test_one_change_a_model_at_a_time(world: World) -> None:
    world.others.gate = asyncio.Event()
    servable = world.hold()
    world.now += POLICY.scale_sweep_ms
    await world.scaler.sweep()
    for _ in range(5):
        world.use(servable, 4_000)
        world.now += POLICY.scale_up_cooldown_ms
        await world.scaler.sweep()
        await asyncio.sleep(0)
    assert len(world.others.loads) == 1
    world.others.gate.set()
    await world.after()


async def test_while_the_store_is_away_nothing_is_decided(world: World) -> None:
    servable = world.hold()
    await world.after()
    world.others.away = True
    world.use(servable, 4_000)
    with pytest.raises(StoreUnavailable):
        await world.after()
    world.others.away = False
    world.use(servable, 4_000)
    await world.after()
    assert world.told("scale_up")


async def test_a_draining_instance_decides_nothing(world: World) -> None:
    servable = world.hold()
    await world.after()
    world.pod.cache.draining = True
    world.use(servable, 4_000)
    await world.after()
    assert world.others.reads == []


async def test_who_is_told_to_end_ends_what_it_waits_for(world: World) -> None:
    world.scaler.use_policy(replace(POLICY, scale_sweep_ms=1))
    world.others.gate = asyncio.Event()
    servable = world.hold()
    running = asyncio.create_task(world.scaler.run())
    await until(lambda: world.scaler._watched)
    world.now += MINUTE
    world.use(servable, 4_000)
    await until(lambda: world.others.loads)
    running.cancel()
    with pytest.raises(asyncio.CancelledError):
        await running
    assert world.scaler._changing == {}


async def test_a_copy_that_went_is_forgotten(world: World) -> None:
    world.hold()
    await world.after()
    del world.pod.servables["m"]
    await world.after()
    assert world.scaler._watched == {}


async def test_several_copies_come_one_claim_after_another(tmp_path: Path) -> None:
    """Over real instances: loads placed at once would lose their claims against each other."""
    async with several(tmp_path, 5) as (rig, *others):
        pods = [rig.pod, *(other.pod for other in others)]
        rig.register("m")
        for first in (rig, others[0]):
            await first.load("m")
        await until(lambda: all(o.copy("m").state is CopyState.LOADED for o in (rig, others[0])))
        view = await rig.instance.neighbours.read_copies("m")
        if decider(view, "m") != rig.instance.instance_id:  # claimed in the same millisecond
            rig = others[0]
        at = [0]
        clock = SimpleNamespace(now_ms=lambda: rig.instance.clock.now_ms() + at[0])
        policy = replace(POLICY, copies_max_share=1.0)
        log = DecisionLog(now_ms=clock.now_ms)
        scaler = Scaler(rig.pod, rig.instance.neighbours, policy, clock, log)  # type: ignore[arg-type]
        await scaler.sweep()
        at[0] = 2 * policy.scale_up_cooldown_ms
        rig.pod.servables["m"].use.uses += 1_000_000
        await scaler.sweep()
        await until(lambda: sum("m" in pod.servables for pod in pods) == 4)
        assert len(log.decisions.recent(9)) == 1
