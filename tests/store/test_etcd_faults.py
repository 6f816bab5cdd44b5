"""A real etcd that is killed, paused, compacted, cut off, full or absent: nothing is lost."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

import pytest

from mesh.core.errors import InvalidArgument
from mesh.store.api import (
    MAX_TXN_OPS,
    LeaseNotFound,
    Put,
    Snapshot,
    StoreFull,
    StoreUnavailable,
)
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_options import EtcdOptions
from tests.etcd_server import EtcdServer, free_port
from tests.store.tcp_proxy import TcpProxy
from tests.store.watching import WAIT_S, Watching

pytestmark = pytest.mark.etcd


@pytest.fixture
def server() -> Iterator[EtcdServer]:
    """One for each test: it is maltreated."""
    with EtcdServer() as made:
        yield made


@asynccontextmanager
async def client(*endpoints: str, call_timeout_ms: int = 5_000) -> AsyncIterator[EtcdStore]:
    store = EtcdStore(EtcdOptions(endpoints, call_timeout_ms=call_timeout_ms))
    try:
        yield store
    finally:
        await store.close()


async def persist(write: Callable[[], Awaitable[object]]) -> None:
    """Repeat an idempotent write until it is answered."""
    async with asyncio.timeout(WAIT_S):
        while True:
            try:
                await write()
                return
            except StoreUnavailable:
                await asyncio.sleep(0.01)


async def test_a_watch_resumes_after_kill_and_restart_with_nothing_lost(
    server: EtcdServer,
) -> None:
    async with (
        client(server.endpoint) as writer,
        client(server.endpoint) as reader,
        Watching(reader) as watching,
    ):
        for round_number in range(3):
            for number in range(20):
                key = f"k/{round_number}/{number}"
                await persist(lambda key=key: writer.put(key, b""))
            await asyncio.to_thread(server.restart)
            await persist(lambda n=round_number: writer.put(f"after/{n}", b""))
        await watching.until(lambda: len(watching.state) == 63)
        assert watching.snapshots == 1  # by its revision, not by reading all again
        truth = {item.key for item in (await writer.range("")).items}
        assert truth == set(watching.state)


async def test_writers_that_go_on_through_a_kill(server: EtcdServer) -> None:
    async with (
        client(server.endpoint) as writer,
        client(server.endpoint) as reader,
        Watching(reader) as watching,
    ):
        acknowledged: set[str] = set()

        async def write(name: str) -> None:
            for number in range(60):
                key = f"k/{name}/{number}"
                await persist(lambda key=key: writer.put(key, b""))
                acknowledged.add(key)

        writing = [asyncio.create_task(write(name)) for name in "abcd"]
        await watching.until(lambda: len(watching.state) > 20)
        await asyncio.to_thread(server.restart)
        await asyncio.gather(*writing)
        await watching.until(lambda: acknowledged <= set(watching.state))
        assert len(acknowledged) == 240


async def test_compaction_while_the_watcher_is_cut_off_gives_a_snapshot(
    server: EtcdServer,
) -> None:
    async with (
        TcpProxy(server.endpoint) as proxy,
        client(server.endpoint) as writer,
        client(proxy.endpoint) as reader,
        Watching(reader) as watching,
    ):
        await writer.put("stays", b"1")
        await writer.put("goes", b"1")
        await watching.until(lambda: len(watching.state) == 2)
        proxy.cut()
        await writer.delete("goes")
        await writer.put("stays", b"2")
        last = await writer.put("new", b"1")
        await writer.compact(last)
        proxy.mend()
        await watching.until(lambda: watching.snapshots == 2)
        assert watching.state == {"stays": b"2", "new": b"1"}
        await writer.put("later", b"1")
        await watching.until(lambda: "later" in watching.state)


async def test_a_cut_watcher_without_compaction_gets_the_events(server: EtcdServer) -> None:
    async with (
        TcpProxy(server.endpoint) as proxy,
        client(server.endpoint) as writer,
        client(proxy.endpoint) as reader,
        Watching(reader) as watching,
    ):
        for cut_number in range(4):
            proxy.cut()
            for number in range(50):
                await writer.put(f"k/{cut_number}/{number}", b"")
            proxy.mend()
        await watching.until(lambda: len(watching.events) == 200)
        assert watching.snapshots == 1


async def test_a_watch_that_lags_by_thousands_of_revisions_resumes(server: EtcdServer) -> None:
    # etcd sends a backlog in batches whose headers carry the newest revision: a client that
    # trusts those headers skips what is still to come when it is cut in between
    async with (
        TcpProxy(server.endpoint) as proxy,
        client(server.endpoint) as writer,
        client(proxy.endpoint) as reader,
        Watching(reader) as watching,
    ):
        proxy.cut()
        for start in range(0, 3_000, 50):
            keys = [f"k/{number}" for number in range(start, start + 50)]
            await asyncio.gather(*(writer.put(key, b"x" * 200) for key in keys))
        proxy.mend()
        for threshold in (1, 1_000, 2_000):
            await watching.until(lambda least=threshold: len(watching.state) >= least)
            proxy.cut()
            proxy.mend()
        await watching.until(lambda: len(watching.state) == 3_000)
        assert len(watching.events) == 3_000  # none twice


async def test_events_of_one_revision_larger_than_a_message_arrive_whole(
    server: EtcdServer,
) -> None:
    # 1.4 MB of a transaction is near etcd's request limit; together they pass gRPC's usual 4 MiB
    async with client(server.endpoint) as store:
        for number in range(6):
            await store.txn([], [Put(f"big/{number}/{n}", b"x" * 14_000) for n in range(100)])
        assert len((await store.range("")).items) == 600
        async with Watching(store) as watching:
            await store.txn([], [Put(f"more/{n}", b"x" * 14_000) for n in range(100)])
            await watching.until(lambda: len(watching.events) == 100)
            assert len({event.mod_revision for event in watching.events}) == 1


async def test_a_range_in_pages_is_one_revision_while_others_write(server: EtcdServer) -> None:
    async with client(server.endpoint) as store:
        for start in range(0, 1_200, MAX_TXN_OPS):
            numbers = range(start, min(start + MAX_TXN_OPS, 1_200))
            await store.txn([], [Put(f"k/{n:05}", b"") for n in numbers])
        stop = asyncio.Event()

        async def write_on() -> None:
            number = 0
            while not stop.is_set():
                # one key more and one key less at each revision: any page mix would show
                await store.txn([], [Put(f"k/a{number}", b""), Put(f"k/{number:05}", b"new")])
                number += 1

        writing = asyncio.create_task(write_on())
        for _ in range(5):
            snapshot = await store.range("k/", page_size=100)
            new = sum(item.value == b"new" for item in snapshot.items)
            assert len(snapshot.items) == 1_200 + new
            assert all(item.mod_revision <= snapshot.revision for item in snapshot.items)
        stop.set()
        await writing


async def test_a_lease_lives_on_over_a_restart(server: EtcdServer) -> None:
    async with client(server.endpoint) as store:
        lease = await store.lease(5_000)
        await store.put("instances/i", b"", lease_id=lease.lease_id)
        await asyncio.to_thread(server.restart)
        await persist(lambda: store.put("models/m", b""))
        before_ms = lease.remaining_ms
        async with asyncio.timeout(WAIT_S):
            while lease.remaining_ms <= before_ms:  # noqa: ASYNC110 - renewed by its own task
                await asyncio.sleep(0.01)
        assert not lease.lost
        assert await store.get("instances/i") is not None


async def test_a_client_cut_off_for_longer_than_its_lease_hears_of_the_loss(
    server: EtcdServer,
) -> None:
    async with (
        TcpProxy(server.endpoint) as proxy,
        client(server.endpoint) as other,
        client(proxy.endpoint) as store,
        Watching(other) as watching,
    ):
        lease = await store.lease(1_000)
        await store.put("instances/i", b"", lease_id=lease.lease_id)
        await watching.until(lambda: "instances/i" in watching.state)
        proxy.cut()
        await watching.until(lambda: watching.state == {})
        assert lease.remaining_ms == 0 and not lease.lost  # it cannot know yet, nor rely on it
        proxy.mend()
        async with asyncio.timeout(WAIT_S):
            await lease.wait_lost()
        assert lease.lost
        with pytest.raises(LeaseNotFound):
            await store.put("instances/i", b"", lease_id=lease.lease_id)
        again = await store.lease(1_000)
        await store.put("instances/i", b"", lease_id=again.lease_id)


async def test_a_paused_etcd_costs_calls_their_time_out_and_watches_nothing(
    server: EtcdServer,
) -> None:
    async with (
        client(server.endpoint, call_timeout_ms=300) as store,
        Watching(store) as watching,
    ):
        await persist(lambda: store.put("a", b"1"))
        server.pause()
        with pytest.raises(StoreUnavailable, match="did not answer a put of 'b' in time"):
            await store.put("b", b"")
        with pytest.raises(StoreUnavailable, match="in time"):
            await store.get("a")
        server.resume()
        await persist(lambda: store.put("c", b""))
        await watching.until(lambda: "c" in watching.state)
        assert watching.snapshots == 1


async def test_an_etcd_that_is_not_there_is_waited_for_and_named(
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = EtcdServer()
    caplog.set_level(logging.INFO, "mesh.store")
    try:
        async with client(server.endpoint) as store:
            with pytest.raises(StoreUnavailable, match=server.endpoint):
                await store.get("a")
            waiting = asyncio.create_task(store.wait_ready())
            watch = store.watch("")
            first = asyncio.create_task(anext(watch))
            async with asyncio.timeout(WAIT_S):
                while "waiting for etcd at" not in caplog.text:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            assert not waiting.done() and not first.done()
            await asyncio.to_thread(server.start)
            async with asyncio.timeout(WAIT_S):
                await waiting
                assert isinstance(await first, Snapshot)
            assert f"etcd at {server.endpoint} answers" in caplog.text
    finally:
        server.close()


async def test_a_dead_endpoint_beside_a_living_one_costs_nothing_but_time(
    server: EtcdServer,
) -> None:
    dead = f"127.0.0.1:{free_port()}"
    async with client(dead, server.endpoint) as store:
        await store.put("a", b"1")  # never sent to the dead one, so it may go to the other
        found = await store.get("a")
        assert found is not None and found.value == b"1"
        async with Watching(store) as watching:
            await store.put("b", b"")
            await watching.until(lambda: "b" in watching.state)


async def test_failing_over_between_two_ways_to_one_etcd(server: EtcdServer) -> None:
    async with (
        TcpProxy(server.endpoint) as one,
        TcpProxy(server.endpoint) as two,
        client(one.endpoint, two.endpoint) as store,
        Watching(store) as watching,
    ):
        for number, (down, up) in enumerate([(one, two), (two, one), (one, two)]):
            up.mend()
            down.cut()
            await persist(lambda n=number: store.put(f"k/{n}", b""))
            await watching.until(lambda n=number: f"k/{n}" in watching.state)


async def test_a_full_etcd_says_what_to_do(server: EtcdServer) -> None:
    with EtcdServer(quota_bytes=1_000_000) as small:
        async with client(small.endpoint) as store:
            await store.put("models/m", b"kept")
            with pytest.raises(StoreFull, match=r"NOSPACE.*defragment.*alarm disarm"):
                for number in range(200):
                    await store.put(f"fill/{number}", b"x" * 100_000)
            found = await store.get("models/m")
            assert found is not None and found.value == b"kept"


async def test_a_value_over_etcds_limit_is_the_callers_fault(server: EtcdServer) -> None:
    async with client(server.endpoint) as store:
        with pytest.raises(InvalidArgument, match="too large"):
            await store.put("a", b"x" * 2_000_000)


async def test_a_store_that_went_back_in_time_is_read_anew(server: EtcdServer) -> None:
    """A wiped or restored etcd: its revision is behind what the watch has seen."""
    async with client(server.endpoint) as store, Watching(store) as watching:
        for number in range(20):
            await store.put(f"k/{number}", b"")
        await watching.until(lambda: len(watching.state) == 20)
        await asyncio.to_thread(server.kill)
        (server.folder / "data").rename(server.folder / "old")
        await asyncio.to_thread(server.start)
        await watching.until(lambda: watching.snapshots == 2)
        assert watching.state == {}
        await persist(lambda: store.put("new", b""))
        await watching.until(lambda: set(watching.state) == {"new"})


async def test_one_namespace_does_not_see_the_other(server: EtcdServer) -> None:
    options = EtcdOptions((server.endpoint,))
    one = EtcdStore(options, prefix="mesh", namespace="one")
    longer = EtcdStore(options, prefix="mesh", namespace="one-more")
    try:
        await one.put("models/m", b"1")
        await longer.put("models/n", b"2")
        assert [item.key for item in (await one.range("")).items] == ["models/m"]
        assert [item.key for item in (await longer.range("")).items] == ["models/n"]
        assert one.root == "/mesh/one/"
    finally:
        await one.close()
        await longer.close()


async def test_cancelling_a_call_leaves_the_store_usable(server: EtcdServer) -> None:
    async with client(server.endpoint) as store:
        await store.wait_ready()
        for _ in range(20):
            task = asyncio.create_task(store.put("a", b"1"))
            await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
        await store.put("b", b"1")
