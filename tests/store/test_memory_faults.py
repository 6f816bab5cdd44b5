"""The scripted faults of the store in memory do what they say: others' tests lean on them."""

from __future__ import annotations

import asyncio

import pytest

from mesh.store.api import KeyAbsent, Put, StoreFull, StoreUnavailable
from mesh.store.memory import MAX_HISTORY_EVENTS, MemoryStore
from tests.store.watching import WAIT_S, Watching


async def test_away_and_back() -> None:
    store = MemoryStore()
    async with Watching(store) as watching:
        store.server.go_away()
        with pytest.raises(StoreUnavailable):
            await store.put("a", b"")
        waiting = asyncio.create_task(store.wait_ready())
        await asyncio.sleep(0)
        assert not waiting.done()
        store.server.come_back()
        async with asyncio.timeout(WAIT_S):
            await waiting
        await store.put("a", b"")
        await watching.until(lambda: "a" in watching.state)
        assert watching.snapshots == 1


async def test_cut_watches_get_the_events_later() -> None:
    store = MemoryStore()
    async with Watching(store) as watching:
        store.server.cut_watches()
        for number in range(3):
            await store.put(f"k/{number}", b"")
        assert watching.events == []
        store.server.restore_watches()
        await watching.until(lambda: len(watching.events) == 3)


async def test_lost_history_is_a_snapshot_for_those_that_lag_only() -> None:
    store = MemoryStore()
    async with Watching(store) as watching:
        await store.put("a", b"")
        await watching.until(lambda: len(watching.events) == 1)
        store.server.lose_history()
        await store.put("b", b"")
        await watching.until(lambda: "b" in watching.state)
        assert watching.snapshots == 1
        store.server.cut_watches()
        await store.delete("a")
        store.server.lose_history()
        store.server.restore_watches()
        await watching.until(lambda: watching.snapshots == 2)
        assert set(watching.state) == {"b"}


async def test_resync_gives_everybody_a_snapshot() -> None:
    store = MemoryStore()
    async with Watching(store) as one, Watching(store.peer(), "x") as other:
        store.server.resync_watches()
        await one.until(lambda: one.snapshots == 2)
        await other.until(lambda: other.snapshots == 2)


async def test_a_partition_hits_one_client_and_its_leases() -> None:
    store = MemoryStore()
    other = store.peer()
    async with Watching(other) as watching:
        lease = await store.lease(20)
        await store.put("instances/i", b"", lease_id=lease.lease_id)
        await watching.until(lambda: "instances/i" in watching.state)
        store.partition()
        with pytest.raises(StoreUnavailable):
            await store.get("a")
        await watching.until(lambda: watching.state == {})
        assert not lease.lost and lease.remaining_ms == 0
        store.heal()
        async with asyncio.timeout(WAIT_S):
            await lease.wait_lost()


async def test_no_lease_runs_out_while_the_server_is_away() -> None:
    store = MemoryStore()
    lease = await store.lease(1)
    await store.put("a", b"", lease_id=lease.lease_id)
    store.server.go_away()
    store.partition()
    passed = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, passed.set)
    await passed.wait()
    store.heal()
    store.server.come_back()
    assert await store.get("a") is not None and not lease.lost


async def test_expiring_a_lease_now() -> None:
    store = MemoryStore()
    lease = await store.lease(60_000)
    await store.txn([], [Put("a", b"", lease.lease_id), Put("b", b"", lease.lease_id)])
    before = store.server.revision
    store.server.expire_lease(lease.lease_id)
    assert lease.lost
    assert store.server.keys() == []
    assert store.server.revision == before + 1  # all keys in one revision
    store.server.expire_lease(12345)


async def test_scripted_failures_in_order() -> None:
    store = MemoryStore()
    store.server.fail_next(after=1)
    store.server.fail_next(applied=True)
    store.server.fail_next(error=StoreFull("full"))
    await store.put("a", b"1")
    with pytest.raises(StoreUnavailable):
        await store.put("lost", b"")
    with pytest.raises(StoreUnavailable):
        await store.txn([KeyAbsent("kept")], [Put("kept", b"")])
    with pytest.raises(StoreFull):
        await store.delete("a")
    assert store.server.keys() == ["a", "kept"]
    await store.delete("a")


async def test_held_calls_hang_and_then_happen() -> None:
    store = MemoryStore()
    store.server.hold_calls()
    held = asyncio.create_task(store.put("a", b""))
    cancelled = asyncio.create_task(store.put("b", b""))
    await asyncio.sleep(0)
    assert not held.done()
    cancelled.cancel()
    store.server.release_calls()
    await held
    assert store.server.keys() == ["a"]


async def test_history_is_bounded_and_a_watch_that_lags_further_starts_afresh() -> None:
    store = MemoryStore()
    async with Watching(store) as watching:
        store.server.cut_watches()
        for _ in range(MAX_HISTORY_EVENTS // 100 + 2):
            store.server.apply([Put(f"k/{number}", b"") for number in range(100)])
        store.server.restore_watches()
        await watching.until(lambda: watching.snapshots == 2)
        assert len(watching.state) == 100
