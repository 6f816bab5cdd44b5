"""Going on with a download that broke off, and when not to; the rate limit."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from mesh.core.errors import LoadFailed
from puller import journal
from puller.journal import Journal, merged, missing
from puller.rate import RateLimit
from tests.puller.conftest import OpenPuller, entries, leftovers, request
from tests.puller.fakes import WAIT_S, FakeStore, content

URI = "s3://bucket/m"


def partials(cache_dir: Path) -> list[Path]:
    return sorted((cache_dir / "partial").iterdir())


def dead_after(limit: int) -> FakeStore:
    """A store whose lines die for parts that begin behind ``limit``."""
    store = FakeStore({"m": content(50_000)})
    store.fault = lambda key, start, end: None if start < limit else 0
    return store


async def broken_off(open_puller: OpenPuller, store: FakeStore) -> None:
    puller = open_puller(store, attempts_max=1, parallelism=1)
    with pytest.raises(LoadFailed, match="connection lost"):
        await puller.fetch(request(URI))
    await puller.close()
    store.fault = lambda *_: None
    store.reads.clear()


async def test_the_next_fetch_reads_only_what_is_missing(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = dead_after(30_000)
    await broken_off(open_puller, store)
    assert leftovers(cache_dir) == []
    seen: list[int] = []
    artifact = await open_puller(store).fetch(request(URI), lambda done, _: seen.append(done))
    assert artifact.path.read_bytes() == store.objects["m"]
    assert sorted(start for _, start, _ in store.reads) == [30_000, 40_000]
    assert (seen[0], seen[-1]) == (30_000, 50_000)
    assert partials(cache_dir) == []


async def test_what_was_kept_is_checked_with_the_rest(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = dead_after(30_000)
    await broken_off(open_puller, store)
    (partial,) = partials(cache_dir)
    with (partial / "content/m").open("r+b") as file:
        file.write(b"damaged on the disk")
    artifact = await open_puller(store).fetch(request(URI))
    assert artifact.path.read_bytes() == store.objects["m"]  # the MD5 told


async def test_another_version_begins_anew(open_puller: OpenPuller, cache_dir: Path) -> None:
    store = dead_after(30_000)
    await broken_off(open_puller, store)
    store.objects["m"] = content(50_000, seed=1)
    artifact = await open_puller(store).fetch(request(URI))
    assert artifact.path.read_bytes() == store.objects["m"]
    assert len(store.reads) == 5
    assert partials(cache_dir) == []


async def test_a_journal_of_another_boot_does_not_count(
    open_puller: OpenPuller, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = dead_after(30_000)
    await broken_off(open_puller, store)
    monkeypatch.setattr(journal, "boot_id", lambda: "a later boot")
    artifact = await open_puller(store).fetch(request(URI))
    assert artifact.path.read_bytes() == store.objects["m"]
    assert len(store.reads) == 5


async def test_what_lies_for_a_day_is_removed_at_the_next_start(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = dead_after(30_000)
    await broken_off(open_puller, store)
    (partial,) = partials(cache_dir)
    os.utime(partial, (1, 1))
    await open_puller(store).start()
    assert partials(cache_dir) == []


async def test_broken_off_downloads_give_way_before_entries(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = dead_after(30_000)
    await broken_off(open_puller, store)
    store.objects |= {"n": content(40_000, 1), "o": content(40_000, 2)}
    puller = open_puller(store, cache_capacity_bytes=130_000)
    for name in ("n", "o"):
        puller.release(await puller.fetch(request(f"s3://bucket/{name}")))
    assert len(partials(cache_dir)) == 1
    store.objects["p"] = content(50_000, 3)
    await puller.fetch(request("s3://bucket/p"))
    assert (len(partials(cache_dir)), len(entries(cache_dir))) == (0, 3)


async def test_a_closed_puller_keeps_what_came_for_the_next(open_puller: OpenPuller) -> None:
    store = FakeStore({"m": content(50_000)})
    puller = open_puller(store, parallelism=1)
    hanging = asyncio.Event()

    def hang(_key: str, start: int, _end: int) -> None:
        if start == 20_000:
            store.gate = asyncio.Event()
            hanging.set()

    store.before_read = hang
    waiter = asyncio.create_task(puller.fetch(request(URI)))
    async with asyncio.timeout(WAIT_S):
        await hanging.wait()
        await puller.close()
    with pytest.raises(LoadFailed, match="closed"):
        await waiter
    store.gate = store.before_read = None
    store.reads.clear()
    await open_puller(store).fetch(request(URI))
    assert sorted(start for _, start, _ in store.reads) == [20_000, 30_000, 40_000]


def test_a_line_that_was_cut_off_ends_the_journal(tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    (tmp_path / "content/m").write_bytes(b"x" * 30)
    mine = Journal(tmp_path, "content")
    mine.add("m", 0, 10)
    mine.add("m", 10, 20)
    with (tmp_path / "journal").open("ab") as file:
        file.write(b'["m",20,3')
    assert mine.read({"m": 30}) == {"m": [(0, 20)]}


def test_a_range_outside_the_file_voids_the_journal(tmp_path: Path) -> None:
    (tmp_path / "content").mkdir()
    (tmp_path / "content/m").write_bytes(b"x" * 30)
    mine = Journal(tmp_path, "content")
    mine.add("m", 0, 31)
    assert mine.read({"m": 30}) == {}
    assert not (tmp_path / "journal").exists()


def test_gaps_are_what_ranges_leave() -> None:
    assert merged([(5, 7), (0, 2), (2, 4), (6, 9)]) == [(0, 4), (5, 9)]
    assert missing([(0, 4), (5, 9)], 10) == [(4, 5), (9, 10)]
    assert missing([], 3) == [(0, 3)]
    assert missing([(0, 3)], 3) == []


def test_the_rate_is_kept_over_all_who_read() -> None:
    rate = RateLimit(1_000)
    assert rate.wait_s(100, now_s=0.0) == pytest.approx(0.1)
    assert rate.wait_s(1_000, now_s=0.0) == pytest.approx(1.1)
    assert rate.wait_s(1, now_s=50.0) == 0.0  # what was not used is not saved up
    assert rate.wait_s(1_000, now_s=50.0) == pytest.approx(0.901)


def test_no_rate_is_no_limit() -> None:
    assert RateLimit(0).wait_s(1 << 40, now_s=0.0) == 0.0
