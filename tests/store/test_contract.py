"""What every store promises, asked of the one in memory and of a real etcd alike."""

from __future__ import annotations

import asyncio

import pytest

from mesh.core.errors import InvalidArgument
from mesh.store.api import (
    MAX_TXN_OPS,
    Delete,
    KeyAbsent,
    KeyExists,
    KVStore,
    LeaseNotFound,
    ModRevisionIs,
    PrefixUnchangedSince,
    Put,
    Snapshot,
    StoreUnavailable,
)
from tests.store.conftest import OpenStore
from tests.store.watching import WAIT_S, Watching

# --- single keys --------------------------------------------------------------------------------


async def test_a_key_that_was_never_put_is_none(store: KVStore) -> None:
    assert await store.get("models/a") is None


async def test_put_then_get(store: KVStore) -> None:
    revision = await store.put("models/a", b"\x00\xff")
    found = await store.get("models/a")
    assert found is not None
    assert (found.key, found.value, found.lease_id) == ("models/a", b"\x00\xff", 0)
    assert found.mod_revision == found.create_revision == revision


async def test_a_second_put_moves_mod_revision_only(store: KVStore) -> None:
    first = await store.put("models/a", b"1")
    second = await store.put("models/a", b"2")
    found = await store.get("models/a")
    assert second > first
    assert found is not None
    assert (found.create_revision, found.mod_revision, found.value) == (first, second, b"2")


async def test_delete_tells_whether_the_key_was_there(store: KVStore) -> None:
    await store.put("models/a", b"1")
    assert await store.delete("models/a") is True
    assert await store.delete("models/a") is False
    assert await store.get("models/a") is None


async def test_a_key_created_again_has_a_new_create_revision(store: KVStore) -> None:
    first = await store.put("a", b"1")
    await store.delete("a")
    again = await store.put("a", b"1")
    found = await store.get("a")
    assert found is not None and found.create_revision == again > first


async def test_ready_at_once_when_the_store_answers(store: KVStore) -> None:
    async with asyncio.timeout(WAIT_S):
        await store.wait_ready()


# --- ranges -------------------------------------------------------------------------------------


async def test_a_range_is_by_prefix_and_in_order(store: KVStore) -> None:
    for key in ("copies/b/1", "copies/a/2", "copies/a/1", "copiesX", "copies"):
        await store.put(key, key.encode())
    last = await store.put("models/z", b"")
    snapshot = await store.range("copies/")
    assert [item.key for item in snapshot.items] == ["copies/a/1", "copies/a/2", "copies/b/1"]
    assert snapshot.revision >= last
    everything = await store.range("")
    assert [item.key for item in everything.items] == sorted(
        ["copies", "copies/a/1", "copies/a/2", "copies/b/1", "copiesX", "models/z"]
    )


async def test_a_range_of_nothing_has_the_revision(store: KVStore) -> None:
    revision = await store.put("a", b"")
    assert await store.range("b/") == Snapshot((), revision)


@pytest.mark.parametrize("page_size", [1, 7, 1_000])
async def test_pages_join_without_gap_or_repeat(store: KVStore, page_size: int) -> None:
    keys = [f"models/{number:03}" for number in range(30)]
    await store.txn([], [Put(key, b"v") for key in keys])
    snapshot = await store.range("models/", page_size=page_size)
    assert [item.key for item in snapshot.items] == keys


async def test_more_than_a_thousand_keys(store: KVStore) -> None:
    keys = [f"models/{number:05}" for number in range(2_500)]
    for start in range(0, len(keys), MAX_TXN_OPS):
        await store.txn([], [Put(key, key.encode()) for key in keys[start : start + MAX_TXN_OPS]])
    snapshot = await store.range("")
    assert [item.key for item in snapshot.items] == keys
    assert all(item.value == item.key.encode() for item in snapshot.items)


async def test_a_page_size_below_one_is_refused(store: KVStore) -> None:
    with pytest.raises(InvalidArgument, match="page_size is 0"):
        await store.range("", page_size=0)


# --- transactions -------------------------------------------------------------------------------


async def test_all_operations_happen_at_one_revision(store: KVStore) -> None:
    await store.put("gone", b"")
    await store.put("many/1", b"")
    await store.put("many/2", b"")
    result = await store.txn(
        [], [Put("a", b"1"), Put("b", b"2"), Delete("gone"), Delete("many/", prefix=True)]
    )
    assert result.succeeded
    items = (await store.range("")).items
    assert [(item.key, item.mod_revision) for item in items] == [
        ("a", result.revision),
        ("b", result.revision),
    ]


async def test_a_failed_transaction_changes_nothing_and_reads(store: KVStore) -> None:
    await store.put("copies/m/i1", b"claim")
    result = await store.txn(
        [KeyExists("copies/m/i1"), KeyAbsent("copies/m/i1")],
        [Put("copies/m/i2", b"mine")],
        read_on_failure=["copies/m/", "none/"],
    )
    assert not result.succeeded
    assert [(item.key, item.value) for item in result.read] == [("copies/m/i1", b"claim")]
    assert await store.get("copies/m/i2") is None


async def test_a_transaction_that_succeeds_reads_nothing(store: KVStore) -> None:
    result = await store.txn([KeyAbsent("a")], [Put("a", b"")], read_on_failure=["a"])
    assert result.succeeded and result.read == ()


async def test_without_operations_it_is_a_check_that_moves_no_revision(store: KVStore) -> None:
    revision = await store.put("a", b"")
    assert (await store.txn([KeyExists("a")], [])).revision == revision
    assert (await store.txn([], [Delete("never")])).revision == revision
    assert not (await store.txn([KeyExists("b")], [])).succeeded


@pytest.mark.parametrize("state", ["absent", "present", "changed", "deleted"])
async def test_conditions(store: KVStore, state: str) -> None:
    seen = await store.put("other", b"")
    if state != "absent":
        seen = await store.put("k/1", b"1")
    if state == "changed":
        await store.put("k/1", b"2")
    if state == "deleted":
        await store.delete("k/1")
    exists = state in ("present", "changed")
    expected = {
        KeyAbsent("k/1"): not exists,
        KeyExists("k/1"): exists,
        ModRevisionIs("k/1", seen): state == "present",
        PrefixUnchangedSince("k/", seen): state != "changed",
        PrefixUnchangedSince("k/", seen - 1): not exists,
        PrefixUnchangedSince("other/", 0): True,
    }
    for condition, holds in expected.items():
        assert (await store.txn([condition], [])).succeeded is holds, condition


async def test_one_changed_key_among_many_breaks_the_prefix_condition(store: KVStore) -> None:
    await store.txn([], [Put(f"k/{number}", b"") for number in range(5)])
    seen = (await store.range("")).revision
    await store.put("k/3", b"changed")
    assert not (await store.txn([PrefixUnchangedSince("k/", seen)], [])).succeeded


async def test_only_one_of_many_claims_wins(open_store: OpenStore) -> None:
    stores = [open_store() for _ in range(4)]
    seen = (await stores[0].range("")).revision
    for store in stores:
        await store.wait_ready()

    async def claim(number: int) -> bool:
        result = await stores[number % 4].txn(
            [PrefixUnchangedSince("copies/m/", seen)],
            [Put(f"copies/m/i{number}", b"LOADING")],
            read_on_failure=["copies/m/"],
        )
        assert result.succeeded or len(result.read) == 1
        return result.succeeded

    won = await asyncio.gather(*(claim(number) for number in range(32)))
    assert sum(won) == 1
    (winner,) = (await stores[0].range("copies/m/")).items
    assert winner.key == f"copies/m/i{won.index(True)}"


async def test_the_biggest_transaction_and_one_more(store: KVStore) -> None:
    operations = [Put(f"k/{number}", b"") for number in range(MAX_TXN_OPS + 1)]
    assert (await store.txn([], operations[:-1])).succeeded
    with pytest.raises(InvalidArgument, match="129 items is over the limit of 128"):
        await store.txn([], operations)


@pytest.mark.parametrize(
    "operations",
    [
        [Put("k/1", b"a"), Put("k/1", b"b")],
        [Put("k/1", b"a"), Delete("k/1")],
        [Delete("k/", prefix=True), Put("k/1", b"a")],
    ],
)
async def test_one_key_twice_is_refused_by_name(
    store: KVStore, operations: list[Put | Delete]
) -> None:
    with pytest.raises(InvalidArgument, match="'k/1' is put"):
        await store.txn([], operations)


# --- leases -------------------------------------------------------------------------------------


async def test_revoking_takes_the_keys_along(store: KVStore) -> None:
    lease = await store.lease(60_000)
    await store.put("instances/i", b"", lease_id=lease.lease_id)
    await store.txn([], [Put("copies/m/i", b"", lease_id=lease.lease_id), Put("models/m", b"")])
    found = await store.get("instances/i")
    assert found is not None and found.lease_id == lease.lease_id
    await lease.revoke()
    assert [item.key for item in (await store.range("")).items] == ["models/m"]
    assert not lease.lost and lease.remaining_ms == 0


async def test_a_put_without_the_lease_takes_the_key_out_of_it(store: KVStore) -> None:
    lease = await store.lease(60_000)
    await store.put("a", b"", lease_id=lease.lease_id)
    await store.put("a", b"")
    await lease.revoke()
    assert await store.get("a") is not None


async def test_a_write_under_a_lease_that_is_gone_says_so(store: KVStore) -> None:
    lease = await store.lease(60_000)
    await lease.revoke()
    with pytest.raises(LeaseNotFound, match="lease"):
        await store.put("a", b"", lease_id=lease.lease_id)
    with pytest.raises(LeaseNotFound, match="lease"):
        await store.txn([], [Put("a", b"", lease_id=lease.lease_id)])
    assert await store.get("a") is None


async def test_a_fresh_lease_has_its_time_before_it(store: KVStore) -> None:
    lease = await store.lease(60_000)
    assert 0 < lease.remaining_ms <= 60_000
    assert not lease.lost


async def test_a_client_that_closes_without_revoking_loses_its_keys_later(
    open_store: OpenStore,
) -> None:
    dying, watcher = open_store(), open_store()
    async with Watching(watcher, "instances/") as watching:
        lease = await dying.lease(1_000)
        await dying.put("instances/i", b"", lease_id=lease.lease_id)
        await watching.until(lambda: "instances/i" in watching.state)
        await dying.close()
        await watching.until(lambda: watching.state == {})
        assert isinstance(watching.events[-1], Delete)


async def test_a_lease_tells_what_stands_under_it(store: KVStore) -> None:
    lease, other = await store.lease(60_000), await store.lease(60_000)
    assert await lease.keys() == frozenset()
    await store.txn(
        [],
        [
            Put("instances/i", b"", lease_id=lease.lease_id),
            Put("copies/m%2F1/i", b"", lease_id=lease.lease_id),
            Put("copies/m/j", b"", lease_id=other.lease_id),
            Put("models/m", b""),
        ],
    )
    assert await lease.keys() == {"instances/i", "copies/m%2F1/i"}
    await store.delete("copies/m%2F1/i")
    assert await lease.keys() == {"instances/i"}


async def test_a_lease_that_is_gone_has_no_keys_to_tell(store: KVStore) -> None:
    lease = await store.lease(60_000)
    await lease.revoke()
    with pytest.raises(LeaseNotFound, match="lease"):
        await lease.keys()


async def test_revoking_twice_is_no_error(store: KVStore) -> None:
    lease = await store.lease(60_000)
    await lease.revoke()
    await lease.revoke()


# --- watches ------------------------------------------------------------------------------------


async def test_a_watch_starts_with_what_is_there(store: KVStore) -> None:
    await store.put("models/a", b"1")
    revision = await store.put("vmodels/a", b"2")
    watch = store.watch("models/")
    async with asyncio.timeout(WAIT_S):
        first = await anext(watch)
    assert isinstance(first, Snapshot)
    assert [(item.key, item.value) for item in first.items] == [("models/a", b"1")]
    assert first.revision >= revision


async def test_changes_come_in_order_and_only_of_the_prefix(open_store: OpenStore) -> None:
    writer, reader = open_store(), open_store()
    async with Watching(reader, "m/") as watching:
        first = await writer.put("m/a", b"1")
        await writer.put("n/a", b"no")
        second = await writer.put("m/a", b"2")
        await writer.put("m", b"no")
        await writer.delete("m/a")
        last = await writer.put("m/b", b"3")
        await watching.until(lambda: watching.revision >= last)
        puts = [e for e in watching.events if isinstance(e, Put)]
        assert [(e.key, e.value) for e in puts] == [("m/a", b"1"), ("m/a", b"2"), ("m/b", b"3")]
        assert [e.create_revision for e in puts] == [first, first, last]
        assert [e.mod_revision for e in puts] == [first, second, last]
        assert isinstance(watching.events[2], Delete) and watching.events[2].key == "m/a"
        assert watching.snapshots == 1


async def test_a_put_event_names_its_lease(store: KVStore) -> None:
    lease = await store.lease(60_000)
    async with Watching(store, "") as watching:
        await store.put("a", b"", lease_id=lease.lease_id)
        await watching.until(lambda: len(watching.events) == 1)
        event = watching.events[0]
        assert isinstance(event, Put) and event.lease_id == lease.lease_id


async def test_a_transaction_is_one_step_of_a_watch(store: KVStore) -> None:
    async with Watching(store) as watching:
        result = await store.txn([], [Put(f"k/{number}", b"") for number in range(100)])
        await watching.until(lambda: watching.revision >= result.revision)
        assert len(watching.events) == 100
        assert {event.mod_revision for event in watching.events} == {result.revision}


async def test_writes_beside_a_starting_watch_are_never_lost(open_store: OpenStore) -> None:
    writer, reader = open_store(), open_store()
    await writer.wait_ready()

    async def write() -> int:
        revision = 0
        for number in range(200):
            revision = await writer.put(f"k/{number}", str(number).encode())
        return revision

    writing = asyncio.create_task(write())
    async with Watching(reader, "k/") as watching:
        await writing
        await watching.until(lambda: len(watching.state) == 200)
        assert watching.state == {f"k/{n}": str(n).encode() for n in range(200)}


async def test_several_watches_of_one_client_each_see_all(store: KVStore) -> None:
    async with Watching(store) as one, Watching(store, "a/") as other:
        await store.put("a/1", b"")
        await one.until(lambda: len(one.events) == 1)
        await other.until(lambda: len(other.events) == 1)


# --- closing ------------------------------------------------------------------------------------


async def test_closing_ends_watches_and_refuses_calls(open_store: OpenStore) -> None:
    store = open_store()
    async with Watching(store) as watching:
        await store.close()
        await watching.until(lambda: watching.ended)
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.get("a")
    with pytest.raises(StoreUnavailable, match="closed"):
        await store.wait_ready()


async def test_closing_one_client_leaves_the_other(open_store: OpenStore) -> None:
    one, other = open_store(), open_store()
    await one.put("a", b"1")
    await one.close()
    found = await other.get("a")
    assert found is not None and found.value == b"1"


async def test_closing_twice_is_no_error(store: KVStore) -> None:
    await store.close()
    await store.close()
