"""Who waits for which fetch, who holds what, and what a cancel ends."""

from __future__ import annotations

import asyncio
import gc
from pathlib import Path

import pytest

from mesh.artifacts import Artifact
from mesh.core.errors import Code, LoadFailed
from puller.puller import Puller
from tests.puller.conftest import OpenPuller, entries, owners, request
from tests.puller.fakes import WAIT_S, FakeStore, content

URI = "s3://bucket/m"


def gated(**objects: bytes) -> FakeStore:
    return FakeStore(objects or {"m": content(20_000)}, gate=asyncio.Event())


def fetch(puller: Puller, uri: str = URI) -> asyncio.Task[Artifact]:
    return asyncio.create_task(puller.fetch(request(uri)))


async def joined(puller: Puller, count: int) -> list[asyncio.Task[Artifact]]:
    """So many waiters of one gated fetch, all of them on board: each was told how far it is."""
    told: list[asyncio.Event] = [asyncio.Event() for _ in range(count)]
    tasks = [
        asyncio.create_task(puller.fetch(request(URI), lambda *_, event=event: event.set()))
        for event in told
    ]
    async with asyncio.timeout(WAIT_S):
        for event in told:
            await event.wait()
    return tasks


async def started(store: FakeStore) -> asyncio.Event:
    """Wait until the download reads; gives the gate that holds it up."""
    async with asyncio.timeout(WAIT_S):
        await store.reading.wait()
    assert store.gate is not None
    return store.gate


async def test_all_who_ask_at_once_share_one_download(open_puller: OpenPuller) -> None:
    store = gated()
    puller = open_puller(store)
    waiters = await joined(puller, 20)
    (await started(store)).set()
    artifacts = await asyncio.gather(*waiters)
    assert store.manifests == 1
    assert len(store.reads) == 2
    assert len({artifact.path for artifact in artifacts}) == 1


async def test_a_latecomer_is_told_how_far_it_is(open_puller: OpenPuller) -> None:
    store = gated()
    puller = open_puller(store)
    first = fetch(puller)
    gate = await started(store)
    seen: list[tuple[int, int | None]] = []
    told = asyncio.Event()

    def tell(done: int, total: int | None) -> None:
        seen.append((done, total))
        told.set()

    late = asyncio.create_task(puller.fetch(request(URI), tell))
    async with asyncio.timeout(WAIT_S):
        await told.wait()
    gate.set()
    await asyncio.gather(first, late)
    assert seen[0] == (0, 20_000)
    assert seen[-1] == (20_000, 20_000)
    assert store.manifests == 1


async def test_a_broken_callback_harms_nobody(open_puller: OpenPuller) -> None:
    def broken(done: int, total: int | None) -> None:
        raise RuntimeError("mine alone")

    store = gated()
    puller = open_puller(store)
    seen: list[int] = []
    waiters = asyncio.gather(
        puller.fetch(request(URI), broken),
        puller.fetch(request(URI), lambda done, total: seen.append(done)),
    )
    (await started(store)).set()
    await waiters
    assert seen[-1] == 20_000


async def test_a_cancelled_waiter_leaves_the_fetch_to_the_others(open_puller: OpenPuller) -> None:
    store = gated()
    puller = open_puller(store)
    leaver, stayer = await joined(puller, 2)
    gate = await started(store)
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    gate.set()
    artifact = await stayer
    assert artifact.path.read_bytes() == store.objects["m"]
    assert store.manifests == 1


async def test_a_fetch_that_nobody_waits_for_still_ends_in_the_cache(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = gated()
    puller = open_puller(store, cache_capacity_bytes=30_000)
    leaver = fetch(puller)
    gate = await started(store)
    leaver.cancel()
    with pytest.raises(asyncio.CancelledError):
        await leaver
    (joiner,) = await joined(puller, 1)  # what goes on
    gate.set()
    artifact = await joiner
    assert store.manifests == 1
    puller.release(artifact)
    # No hold was left by those who went: the entry gives way.
    store.objects["n"] = content(25_000)
    await puller.fetch(request("s3://bucket/n"))
    assert len(entries(cache_dir)) == 1


async def test_an_abandoned_fetch_holds_nothing(open_puller: OpenPuller, cache_dir: Path) -> None:
    store = gated(m=content(20_000), n=content(25_000))
    puller = open_puller(store, cache_capacity_bytes=30_000)
    leaver = fetch(puller)
    gate = await started(store)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    gate.set()
    async with asyncio.timeout(WAIT_S):
        await puller.settle()
        assert len(entries(cache_dir)) == 1
        await puller.fetch(request("s3://bucket/n"))
    assert len(entries(cache_dir)) == 1


async def test_an_error_reaches_everybody_and_is_not_kept(open_puller: OpenPuller) -> None:
    store = gated(m=b"x")
    store.fault = lambda *_: 0
    puller = open_puller(store, attempts_max=1)
    waiters = await joined(puller, 3)
    (await started(store)).set()
    results = await asyncio.gather(*waiters, return_exceptions=True)
    assert [type(result) for result in results] == [LoadFailed] * 3
    assert store.manifests == 1
    store.fault = lambda *_: None
    assert (await puller.fetch(request(URI))).path.read_bytes() == b"x"


async def test_different_artifacts_do_not_wait_for_each_other(open_puller: OpenPuller) -> None:
    store = gated(m=b"m", n=b"n")
    puller = open_puller(store)
    slow = fetch(puller)
    gate = await started(store)
    store.gate = None
    async with asyncio.timeout(WAIT_S):
        await puller.fetch(request("s3://bucket/n"))
    gate.set()
    await slow


async def test_an_artifact_stays_until_its_last_holder_releases_it(
    open_puller: OpenPuller,
) -> None:
    store = FakeStore({"m": content(20_000), "n": content(25_000)})
    puller = open_puller(store, cache_capacity_bytes=30_000)
    first, second = await asyncio.gather(fetch(puller), fetch(puller))
    assert first.path == second.path
    puller.release(first)
    puller.release(first)  # a second time: not somebody else's hold
    with pytest.raises(LoadFailed, match="in use") as caught:
        await puller.fetch(request("s3://bucket/n"))
    assert caught.value.code is Code.UNAVAILABLE
    assert second.path.read_bytes() == store.objects["m"]
    puller.release(second)
    await puller.fetch(request("s3://bucket/n"))
    assert not second.path.exists()


async def test_close_ends_fetches_and_leaves_no_part(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = gated()
    puller = open_puller(store)
    waiter = fetch(puller)
    await started(store)
    async with asyncio.timeout(WAIT_S):
        await puller.close()
    with pytest.raises(LoadFailed, match="closed") as caught:
        await waiter
    assert caught.value.code is Code.UNAVAILABLE
    assert owners(cache_dir) == entries(cache_dir) == []
    with pytest.raises(LoadFailed, match="closed"):
        await puller.fetch(request(URI))
    await puller.close()  # twice is fine


async def test_a_failure_that_nobody_waits_for_is_quiet(
    open_puller: OpenPuller, caplog: pytest.LogCaptureFixture
) -> None:
    store = FakeStore({"m": b"x"}, fault=lambda *_: 0, gate=asyncio.Event())
    puller = open_puller(store, attempts_max=1)
    leaver = fetch(puller)
    gate = await started(store)
    leaver.cancel()
    await asyncio.gather(leaver, return_exceptions=True)
    gate.set()
    async with asyncio.timeout(WAIT_S):
        await puller.settle()
    await asyncio.sleep(0)
    del leaver
    gc.collect()
    assert "never retrieved" not in caplog.text
