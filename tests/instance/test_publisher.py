"""What an instance says in the store, when the store is slow, away, or asked too much at once."""

from __future__ import annotations

import asyncio

import pytest

from mesh.instance.publisher import Publisher
from mesh.store.api import StoreUnavailable
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
