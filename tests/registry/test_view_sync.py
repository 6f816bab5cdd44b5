"""The view ends up as the store is: after a start, changes, a lost history and bad records."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from mesh.core.types import (
    CopyRecord,
    CopyState,
    FailureRecord,
    InstanceRecord,
    InstanceState,
    ModelRecord,
    VModelRecord,
)
from mesh.core.view import ClusterView
from mesh.registry import (
    Record,
    config_key,
    copy_key,
    encode,
    encode_config,
    encode_last_used,
    key_of,
    model_key,
)
from mesh.store.api import Delete, Put
from mesh.store.memory import MemoryStore
from mesh.view_sync import ViewSync

WAIT_S = 60.0


class Running:
    """A view fed from a store, and a way to wait for a revision."""

    def __init__(self, store: MemoryStore) -> None:
        self.store = store
        self.view = ClusterView()
        self.steps: list[frozenset[str] | None] = []
        self.sync = ViewSync(store.peer(), self.view, on_step=self._on_step)
        self._moved = asyncio.Condition()
        self._notices: set[asyncio.Task[None]] = set()

    def _on_step(self, touched: frozenset[str] | None) -> None:
        self.steps.append(touched)
        self._notices.add(asyncio.create_task(self._notify()))

    async def _notify(self) -> None:
        async with self._moved:
            self._moved.notify_all()

    async def put(self, *records: Record) -> None:
        """Write in one transaction and wait until the view has it."""
        result = await self.store.txn([], [Put(key_of(r), encode(r)) for r in records])
        await self.until(result.revision)

    async def until(self, revision: int) -> None:
        async with self._moved, asyncio.timeout(WAIT_S):
            await self._moved.wait_for(lambda: self.sync.revision >= revision)


@asynccontextmanager
async def running(store: MemoryStore) -> AsyncIterator[Running]:
    made = Running(store)
    task = asyncio.create_task(made.sync.run())
    try:
        async with asyncio.timeout(WAIT_S):
            await made.sync.wait_synced()
        yield made
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)


MODEL = ModelRecord("m", "onnx", path="file:///m")
ALIAS = VModelRecord("v", "m", "m")
INSTANCE = InstanceRecord("i", "127.0.0.1:1", InstanceState.READY, 100)
COPY = CopyRecord("m", "i", CopyState.LOADED, size_bytes=7)
FAILURE = FailureRecord("m", "j", "UNAVAILABLE", "disk full", 1, 10)


async def test_an_empty_store_is_a_synced_view() -> None:
    async with running(MemoryStore()) as now:
        assert now.view.synced and now.sync.synced
        assert now.view.models == {}


async def test_the_first_snapshot_fills_every_family() -> None:
    store = MemoryStore()
    await store.txn([], [Put(key_of(r), encode(r)) for r in (MODEL, ALIAS, INSTANCE, COPY)])
    await store.put(key_of(FAILURE), encode(FAILURE))
    await store.put("lastused/i", encode_last_used({"m": 5}))
    last = await store.put("leader", b"router-1")
    async with running(store) as now:
        view = now.view
        assert view.models == {"m": MODEL} and view.vmodels == {"v": ALIAS}
        assert view.loaded_on("m") == ("i",)
        assert view.failures_of("m", 0) == (FAILURE,)
        assert view.last_used_at_ms("m") == 5
        assert view.revision == last
        assert now.steps == [None]


async def test_changes_follow_and_name_their_models() -> None:
    async with running(MemoryStore()) as now:
        await now.put(MODEL)
        await now.put(INSTANCE)
        await now.put(COPY, FAILURE)
        await now.put(ALIAS)
        assert now.view.loaded_on("m") == ("i",)
        assert now.view.copies_of("m") == (COPY,)
        assert now.steps[1:] == [frozenset({"m"}), frozenset(), frozenset({"m"}), frozenset({"m"})]
        await now.store.put("lastused/i", encode_last_used({"m": 9}))
        doomed = (ALIAS, COPY, FAILURE, INSTANCE)
        result = await now.store.txn([], [Delete(key_of(record)) for record in doomed])
        await now.until(result.revision)
        assert now.view.last_used_at_ms("m") == 9
        assert list(now.view.flushed_by_the_gone()) == [("i", 9)]
        assert now.view.vmodels == {} and now.view.instances == {}
        assert now.view.copies_of("m") == () and now.view.failures_of("m", 0) == ()
        await now.store.delete(key_of(MODEL))
        await now.until(result.revision + 1)
        assert now.view.models == {}
        await now.store.delete("lastused/i")
        await now.until(result.revision + 2)
        assert list(now.view.flushed_by_the_gone()) == []


async def test_live_settings_and_use_scores_follow_too() -> None:
    constraints = {"onnx": {"required": ["gpu"]}}
    store = MemoryStore()
    await store.put(key_of(MODEL), encode(MODEL))
    await store.put(config_key("policy"), encode_config({"hops_max": 2}))
    await store.put("lastused/i", encode_last_used({"m": 5}, {"m": 4.25}))
    async with running(store) as now:
        view = now.view
        assert view.config == {"policy": {"hops_max": 2}} and view.use_score("m") == 4.25
        await now.until(await store.put(config_key("type_constraints"), encode_config(constraints)))
        assert view.type_constraints["onnx"].required == ("gpu",)
        assert now.steps[-1] == frozenset()  # of no model in particular, but a step
        bad = await store.put(config_key("type_constraints"), b'{"onnx": {"required": "gpu"}}')
        await now.until(bad)
        assert now.sync.undecodable_total == 1
        assert view.type_constraints["onnx"].required == ("gpu",)  # what was known stays
        await now.until(await store.put("lastused/j", encode_last_used({"m": 6}, {"m": 4.5})))
        assert (view.use_score("m"), view.last_used_at_ms("m")) == (4.5, 6)
        await store.delete(config_key("type_constraints"))
        await now.until(store.server.revision)
        assert view.config == {"policy": {"hops_max": 2}} and not view.type_constraints


async def test_settings_deleted_in_lost_history_are_gone() -> None:
    store = MemoryStore()
    await store.put(config_key("policy"), encode_config({"hops_max": 2}))
    async with running(store) as now:
        store.server.cut_watches()
        await store.delete(config_key("policy"))
        last = await store.put(key_of(MODEL), encode(MODEL))
        store.server.lose_history()
        store.server.restore_watches()
        await now.until(last)
        assert now.view.config == {}


async def test_a_lease_that_runs_out_takes_the_copies_from_the_view() -> None:
    store = MemoryStore()
    lease = await store.lease(60_000)
    for record in (INSTANCE, COPY):
        await store.put(key_of(record), encode(record), lease_id=lease.lease_id)
    async with running(store) as now:
        assert now.view.loaded_on("m") == ("i",)
        store.server.expire_lease(lease.lease_id)
        await now.until(store.server.revision)
        assert now.view.loaded_on("m") == () and now.view.instances == {}


async def test_after_lost_history_the_view_is_replaced() -> None:
    store = MemoryStore()
    other = ModelRecord("other", "onnx")
    await store.txn([], [Put(key_of(r), encode(r)) for r in (MODEL, ALIAS, INSTANCE, COPY)])
    async with running(store) as now:
        store.server.cut_watches()
        await store.txn([], [Delete(key_of(r)) for r in (MODEL, ALIAS, INSTANCE, COPY)])
        last = await store.put(key_of(other), encode(other))
        store.server.lose_history()
        store.server.restore_watches()
        await now.until(last)
        assert now.sync.snapshots_total == 2
        assert now.view.models == {"other": other}
        assert now.view.instances == {} and now.view.loaded_on("m") == ()


async def test_bad_records_are_skipped_and_counted(caplog: pytest.LogCaptureFixture) -> None:
    store = MemoryStore()
    await store.put(model_key("bad"), b"not json")
    await store.put("demand/onnx", b"of a newer version")
    await store.put(key_of(MODEL), encode(MODEL))
    async with running(store) as now:
        assert now.view.models == {"m": MODEL}
        assert now.sync.undecodable_total == 1
        assert "models/bad: the value is not JSON" in caplog.text
        await store.put(copy_key("m", "i"), b'{"state":"?"}')
        await store.put(model_key("m"), b"{}")
        await now.put(ModelRecord("n", "onnx"))
        assert now.sync.undecodable_total == 3
        assert now.view.models["m"] == MODEL  # what was known stays
        assert "n" in now.view.models


async def test_the_loop_ends_when_the_store_is_closed() -> None:
    store = MemoryStore()
    sync = ViewSync(store, ClusterView())
    task = asyncio.create_task(sync.run())
    await sync.wait_synced()
    await store.close()
    async with asyncio.timeout(WAIT_S):
        await task


async def test_a_large_snapshot_leaves_the_loop_to_others() -> None:
    store = MemoryStore()
    operations = [Put(model_key(f"m{n}"), encode(ModelRecord(f"m{n}", "onnx"))) for n in range(100)]
    for start in range(0, 3_000, 100):
        renamed = [Put(f"models/{start}-{n}", op.value) for n, op in enumerate(operations)]
        await store.txn([], renamed)
    turns = 0

    async def count_turns() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count_turns())
    async with running(store) as now:
        counting.cancel()
        assert len(now.view.models) == 3_000
        assert turns > 5
