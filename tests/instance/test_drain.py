"""A leaving instance: what it hands over, to whom, in which order, and what it serves meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from mesh.core.types import CopyState, InstanceState
from mesh.instance.answers import LoadOutcome
from mesh.store.api import StoreUnavailable
from mesh.store.memory import MemoryStore
from tests.instance.fakes import MIB, Rig, until, with_policy

NOW_MS = 1_700_000_000_000  # some last uses: earlier than the clock of any run
MOVES_ALL = {"drain_recent_ms": 10**12}


@asynccontextmanager
async def several(
    tmp_path: Path, count: int, *, policy: dict[str, Any] | None = None, **settings: Any
) -> AsyncIterator[list[Rig]]:
    """Instances of one mesh that know each other. The first is the one to leave."""
    store = MemoryStore()
    settings = {"policy": with_policy(**{**MOVES_ALL, **(policy or {})}), **settings}
    rigs = [Rig(tmp_path, store=store.peer(), **settings) for _ in range(count)]
    try:
        for rig in rigs:
            await rig.start()
        ids = {rig.instance.instance_id for rig in rigs}
        await until(
            lambda: all(ids == rig.instance.neighbours.view.instances.keys() for rig in rigs)
        )
        yield rigs
    finally:
        for rig in rigs:
            rig.runtime.open_all()
        for rig in rigs:
            await rig.instance.close()


async def hold(rig: Rig, *names: str, **wish: Any) -> None:
    """Loaded and published there; each used a moment after the one before."""
    for index, name in enumerate(names):
        answer = await rig.load(name, last_used_at_ms=NOW_MS + index, **wish)
        assert answer.outcome is LoadOutcome.LOADED
        rig.pod.servables[name].use.last_used_at_ms = NOW_MS + index
    await until(lambda: all(rig.copy(name).state is CopyState.LOADED for name in names))


def moves(rig: Rig, reason: str = "") -> list[str]:
    found = rig.instance.decisions.decisions.recent(1_000)
    return [d.model_id for d in reversed(found) if d.kind == "move" and reason in d.reason]


async def test_copies_are_loaded_elsewhere_before_an_instance_leaves(tmp_path: Path) -> None:
    async with several(tmp_path, 2) as (leaving, other):
        for name in "ab":
            leaving.register(name)
        await hold(leaving, "a", "b")
        await leaving.instance.drain()
        assert other.pod.servables.keys() == {"a", "b"}
        assert leaving.server.keys(f"instances/{leaving.instance.instance_id}") == []
        assert leaving.copy("a") is None
        await until(lambda: other.copy("a").state is CopyState.LOADED)


async def test_the_most_recently_used_go_first(tmp_path: Path) -> None:
    async with several(tmp_path, 2, policy={"drain_moves": 1}) as (leaving, other):
        for name in "abcd":
            leaving.register(name)
        await hold(leaving, "c", "a", "d", "b")
        await leaving.instance.drain()
        assert other.runtime.loading == ["b", "d", "a", "c"]
        assert moves(leaving) == ["b", "d", "a", "c"]


async def test_what_rested_for_long_is_left_behind_unless_somebody_said_that_it_matters(
    tmp_path: Path,
) -> None:
    async with several(tmp_path, 2, policy={"drain_recent_ms": 60_000}) as (leaving, other):
        leaving.register("old")
        leaving.register("pinned", pinned=True)
        leaving.register("kept", min_copies=2)
        leaving.register("new")
        await hold(leaving, "old", "kept", "new")
        await hold(leaving, "pinned", pin=True)
        leaving.pod.servables["new"].use.last_used_at_ms = leaving.instance.clock.now_ms()
        await leaving.instance.drain()
        assert other.pod.servables.keys() == {"pinned", "kept", "new"}
        assert other.pod.cache.get("pinned").pinned  # the one that stays has moved
        await until(lambda: other.copy("pinned").pinned)


async def test_it_serves_on_and_says_so_until_its_moves_are_done(tmp_path: Path) -> None:
    async with several(tmp_path, 2) as (leaving, other):
        leaving.register("a")
        await hold(leaving, "a")
        other.runtime.load_gates["a"] = threading.Event()
        drain = asyncio.create_task(leaving.instance.drain())
        await until(lambda: other.runtime.loading == ["a"])
        await until(lambda: leaving.record().state is InstanceState.DRAINING)
        assert "a" in leaving.pod.servables
        assert not leaving.instance.inference.draining
        assert leaving.copy("a").state is CopyState.LOADED
        other.runtime.open_all()
        await drain
        assert "a" in other.pod.servables


async def test_a_copy_that_is_held_elsewhere_is_not_moved(tmp_path: Path) -> None:
    async with several(tmp_path, 3) as (leaving, second, third):
        leaving.register("a")
        await hold(leaving, "a")
        await hold(second, "a")
        await leaving.instance.drain()
        assert third.runtime.loading == []
        assert second.runtime.loading == ["a"]
        assert moves(leaving, "held_elsewhere") == ["a"]


async def test_no_more_than_so_many_are_moved_at_once(tmp_path: Path) -> None:
    async with several(tmp_path, 2, policy={"drain_moves": 2, "load_slots": 8}) as (
        leaving,
        other,
    ):
        names = [f"m{n}" for n in range(5)]
        for name in names:
            leaving.register(name)
            other.runtime.load_gates[name] = threading.Event()
        await hold(leaving, *names)
        drain = asyncio.create_task(leaving.instance.drain())
        await until(lambda: len(other.runtime.loading) == 2)
        assert sorted(other.runtime.loading) == ["m3", "m4"]
        assert other.pod.cache.loading_count == 2
        other.runtime.open_all()
        await drain
        assert len(other.pod.servables) == 5


async def test_an_instance_that_leaves_too_is_no_target(tmp_path: Path) -> None:
    async with several(tmp_path, 3) as (first, second, stays):
        for name in "ab":
            first.register(name)
        await hold(first, "a")
        await hold(second, "b")
        await asyncio.gather(first.instance.drain(), second.instance.drain())
        assert stays.pod.servables.keys() == {"a", "b"}
        assert first.runtime.loading == ["a"]
        assert second.runtime.loading == ["b"]


async def test_with_nobody_to_take_its_copies_it_goes_at_once(tmp_path: Path) -> None:
    async with several(tmp_path, 1) as (alone,):
        alone.register("a")
        await hold(alone, "a")
        await alone.instance.drain()
        assert alone.server.keys("instances/") == []
        assert moves(alone, "nobody_there") == [""]


async def test_an_instance_that_refuses_is_passed_over_for_the_next(tmp_path: Path) -> None:
    async with several(tmp_path, 3) as (leaving, second, third):
        leaving.register("a")
        await hold(leaving, "a")
        for rig in (second, third):
            rig.source.faults["a"] = [OSError("no way to the store of artifacts")]
        await leaving.instance.drain()
        assert sorted([*second.source.fetched, *third.source.fetched]) == ["a", "a"]
        assert len(moves(leaving)) == 3  # each was asked once, then there was nobody left


async def test_moves_end_in_time_for_requests_in_flight(tmp_path: Path) -> None:
    async with several(tmp_path, 2, drain_timeout_ms=2_000) as (leaving, other):
        leaving.register("a")
        await hold(leaving, "a")
        other.runtime.load_gates["a"] = threading.Event()
        await leaving.instance.drain()  # although the other never answers
        assert moves(leaving, "out_of_time") == [""]
        assert leaving.record() is None


@pytest.mark.parametrize("order", ["lru", "frequency"])
async def test_a_full_neighbour_makes_room_for_what_was_used_later(
    tmp_path: Path, order: str
) -> None:
    policy = {"first_use_grace_ms": 0, "eviction_order": order}
    async with several(tmp_path, 2, capacity_bytes=7 * MIB // 2, policy=policy) as (leaving, other):
        size = {"size_bytes_stated": MIB, "size_bytes_measured": MIB}
        for name in "abc":
            leaving.register(name, **size)
        await hold(other, "a", "b", "c")
        leaving.register("moved", **size)
        await hold(leaving, "moved")
        use = leaving.pod.servables["moved"].use
        use.last_used_at_ms = leaving.instance.clock.now_ms()
        await leaving.instance.drain()
        assert "moved" in other.pod.servables
        assert len(other.pod.servables.keys() & set("abc")) == 2


async def test_while_the_store_is_away_copies_move_by_the_last_view(tmp_path: Path) -> None:
    async with several(tmp_path, 2) as (leaving, other):
        leaving.register("a")
        await hold(leaving, "a")
        leaving.server.go_away()
        with pytest.raises(StoreUnavailable):  # so that it is known
            leaving.instance.publisher.put("probe", b"")
            await leaving.instance.publisher.flush()
        assert leaving.instance.publisher.away
        await leaving.instance.drain()
        assert "a" in other.pod.servables
        leaving.server.come_back()
        await until(lambda: other.copy("a") and other.copy("a").state is CopyState.LOADED)
