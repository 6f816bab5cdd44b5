"""What an instance says in the store, when the store is slow, away, or asked too much at once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest

from mesh import registry
from mesh.core.types import CopyRecord, CopyState
from mesh.instance.publisher import Publisher
from mesh.store.api import Put, StoreUnavailable, TxnResult
from mesh.store.memory import MemoryStore


async def publisher(store: MemoryStore, *, lease: bool = True) -> Publisher:
    subject = Publisher(store, "i", flush_delay_s=0)
    if lease:
        subject.use_lease(await store.lease(10_000))
    return subject


async def test_the_last_word_on_a_key_is_what_is_written() -> None:
    store = MemoryStore()
    subject = await publisher(store)
    subject.put_leased("a", b"1")
    subject.put_leased("b", b"1")
    subject.put_leased("a", b"2")
    subject.remove("b")
    await subject.flush()
    assert store.server.get("a").value == b"2"
    assert store.server.keys() == ["a"]


async def test_more_than_one_transaction_holds_goes_in_several() -> None:
    store = MemoryStore()
    subject = await publisher(store)
    for n in range(300):
        subject.put_leased(f"k{n}", b"v")
    before = store.server.revision
    await subject.flush()
    assert len(store.server.keys("k")) == 300
    assert store.server.revision == before + 3


async def test_what_could_not_be_written_is_written_later() -> None:
    store = MemoryStore()
    subject = await publisher(store)
    subject.put_leased("a", b"1")
    store.server.go_away()
    with pytest.raises(StoreUnavailable):
        await subject.flush()
    assert not subject.connected
    store.server.come_back()
    await subject.flush()
    assert store.server.get("a").value == b"1"
    assert subject.connected


async def test_a_flush_that_is_cancelled_loses_nothing() -> None:
    store = MemoryStore()
    subject = await publisher(store)
    subject.put_leased("a", b"1")
    store.server.hold_calls()
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await subject.flush()
    store.server.release_calls()
    await subject.flush()
    assert store.server.get("a").value == b"1"


class LateStore(MemoryStore):
    """Carries out the first transaction only when it is told to: etcd keeps no order between
    transactions that are on their way together."""

    def __init__(self) -> None:
        super().__init__()
        self.asked = asyncio.Event()
        self.go_on = asyncio.Event()

    async def txn(self, *args: Any, **kwargs: Any) -> TxnResult:
        if not self.asked.is_set():
            self.asked.set()
            await self.go_on.wait()
        return await super().txn(*args, **kwargs)


async def test_a_claim_is_not_overtaken_by_the_withdrawal_of_the_copy_before_it() -> None:
    store = LateStore()
    store.server.apply([Put(registry.model_key("m"), b"{}")])
    subject = await publisher(store)
    copy = CopyRecord("m", "i", CopyState.LOADED)
    key = registry.key_of(copy)
    store.server.apply([Put(key, registry.encode(copy))])
    subject.put_copy(copy)
    subject.remove_copy("m")
    withdrawal = asyncio.create_task(subject.flush())
    await store.asked.wait()
    wish = replace(copy, state=CopyState.LOADING)
    claim = asyncio.create_task(subject.claim(wish, store.server.revision))
    for _ in range(10):
        await asyncio.sleep(0)
    store.go_on.set()
    await withdrawal
    await claim
    assert registry.decode(key, store.server.get(key).value).state is CopyState.LOADING


async def test_without_a_lease_only_what_needs_none_is_written() -> None:
    store = MemoryStore()
    subject = await publisher(store, lease=False)
    subject.put_leased("mine", b"1")
    subject.put("failure", b"2")
    await subject.flush()
    assert store.server.keys() == ["failure"]
    subject.use_lease(await store.lease(10_000))
    await subject.flush()
    assert store.server.keys() == ["failure", "mine"]


async def test_a_write_under_an_expired_lease_says_so_and_stays_to_be_written() -> None:
    store = MemoryStore()
    subject = Publisher(store, "i", flush_delay_s=0)
    lease = await store.lease(10_000)
    subject.use_lease(lease)
    store.partition()
    store.server.expire_lease(lease.lease_id)
    subject.put_leased("a", b"1")
    store._reachable = True  # connected again, and not told yet
    with pytest.raises(Exception, match="expired"):
        await subject.flush()
    assert subject.lease_gone.is_set()
    subject.use_lease(await store.lease(10_000))
    await subject.flush()
    assert store.server.get("a").value == b"1"
