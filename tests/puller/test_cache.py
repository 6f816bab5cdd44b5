"""The disk cache by itself: bound, last use, holds, several owners of one folder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mesh.core.errors import Code, LoadFailed
from puller.cache import Begun, DiskCache, EntryName
from puller.disk import RealDisk
from tests.puller.conftest import entries, leftovers
from tests.puller.fakes import FakeDisk

OpenCache = Callable[..., DiskCache]


def name(number: int, size_bytes: int, version: int = 0) -> EntryName:
    return EntryName(f"{number:032x}", f"{version:016x}", size_bytes)


def put(cache: DiskCache, entry: EntryName) -> None:
    assert cache.begin(entry) is Begun.STAGING
    (cache.staging(entry) / "data").write_bytes(bytes(entry.size_bytes))
    cache.publish(entry)


def used_at(cache: DiskCache, entry: EntryName, seconds: int) -> None:
    os.utime(cache.content(entry), (seconds, seconds))


@pytest.fixture
def open_cache(tmp_path: Path) -> Iterator[OpenCache]:
    opened: list[DiskCache] = []

    def make(capacity_bytes: int = 100, disk: RealDisk | None = None) -> DiskCache:
        cache = DiskCache(tmp_path, capacity_bytes, disk or RealDisk())
        cache.start()
        opened.append(cache)
        return cache

    yield make
    for cache in opened:
        cache.close()


def test_names_are_read_back() -> None:
    assert EntryName.parse(str(name(7, 1234, 9))) == name(7, 1234, 9)
    assert EntryName.parse("something else") is None


def test_an_entry_is_there_only_once_it_is_published(open_cache: OpenCache) -> None:
    cache = open_cache()
    assert not cache.try_hold(name(1, 10))
    assert cache.begin(name(1, 10)) is Begun.STAGING
    assert not cache.content(name(1, 10)).exists()
    cache.publish(name(1, 10))
    assert cache.try_hold(name(1, 10))
    assert cache.begin(name(1, 10)) is Begun.PRESENT


def test_the_least_recently_used_goes_first(open_cache: OpenCache, tmp_path: Path) -> None:
    cache = open_cache(100)
    for number in (1, 2, 3):
        put(cache, name(number, 30))
        cache.release(name(number, 30))
    for number, seconds in ((1, 300), (2, 100), (3, 200)):
        used_at(cache, name(number, 30), seconds)
    put(cache, name(4, 40))
    assert entries(tmp_path) == sorted(str(name(n, s)) for n, s in ((1, 30), (3, 30), (4, 40)))
    put(cache, name(5, 60))
    assert entries(tmp_path) == sorted(str(name(n, s)) for n, s in ((4, 40), (5, 60)))
    assert leftovers(tmp_path) == []


def test_a_hold_and_its_end_count_as_use(open_cache: OpenCache) -> None:
    cache = open_cache(100)
    for number in (1, 2):
        put(cache, name(number, 50))
        cache.release(name(number, 50))
        used_at(cache, name(number, 50), 100 + number)
    assert cache.try_hold(name(1, 50))
    cache.release(name(1, 50))
    put(cache, name(3, 50))
    assert cache.content(name(1, 50)).exists()
    assert not cache.content(name(2, 50)).exists()


def test_held_entries_are_never_evicted(open_cache: OpenCache) -> None:
    cache = open_cache(100)
    put(cache, name(1, 60))
    assert cache.try_hold(name(1, 60))  # a second hold
    cache.release(name(1, 60))
    with pytest.raises(LoadFailed, match="the rest is in use") as caught:
        cache.begin(name(2, 60))
    assert caught.value.code is Code.UNAVAILABLE
    assert not cache.discard(name(1, 60))
    cache.release(name(1, 60))
    put(cache, name(2, 60))
    assert not cache.content(name(1, 60)).exists()


def test_an_artifact_larger_than_the_cache_is_final(open_cache: OpenCache) -> None:
    cache = open_cache(100)
    put(cache, name(1, 60))
    cache.release(name(1, 60))
    with pytest.raises(LoadFailed, match="101 bytes, more than the whole") as caught:
        cache.begin(name(2, 101))
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert cache.content(name(1, 60)).exists()  # nothing was evicted for it


def test_room_is_reserved_while_a_download_runs(open_cache: OpenCache, tmp_path: Path) -> None:
    cache, other = open_cache(100), open_cache(100)
    assert cache.begin(name(1, 60)) is Begun.STAGING
    for owner in (cache, other):
        with pytest.raises(LoadFailed, match="in use"):
            owner.begin(name(2, 60))
    cache.abandon(name(1, 60))
    assert leftovers(tmp_path) == []
    put(other, name(2, 60))


def test_a_short_disk_counts_like_a_full_cache(open_cache: OpenCache, tmp_path: Path) -> None:
    disk = FakeDisk(free_bytes=50)
    cache = open_cache(1000, disk)
    put(cache, name(1, 40))
    cache.release(name(1, 40))
    with pytest.raises(LoadFailed, match=r"disk full: .* needs 60 bytes .* 50 are free") as caught:
        cache.begin(name(2, 60))
    assert caught.value.code is Code.UNAVAILABLE
    assert leftovers(tmp_path) == []
    put(cache, name(3, 50))


def test_owners_of_one_folder_respect_each_others_holds(open_cache: OpenCache) -> None:
    a, b = open_cache(100), open_cache(100)
    put(a, name(1, 60))
    assert not b.discard(name(1, 60))
    with pytest.raises(LoadFailed, match="in use"):
        b.begin(name(2, 60))
    assert b.try_hold(name(1, 60))
    a.release(name(1, 60))
    with pytest.raises(LoadFailed, match="in use"):
        a.begin(name(2, 60))
    b.release(name(1, 60))
    put(a, name(2, 60))
    assert not b.try_hold(name(1, 60))


def test_one_of_two_makes_an_entry(open_cache: OpenCache) -> None:
    a, b = open_cache(), open_cache()
    assert a.begin(name(1, 10)) is Begun.STAGING
    assert b.begin(name(1, 10)) is Begun.BUSY
    assert not b.try_hold(name(1, 10))
    a.publish(name(1, 10))
    assert b.begin(name(1, 10)) is Begun.PRESENT
    assert b.begin(name(2, 10)) is Begun.STAGING
    b.abandon(name(2, 10))
    assert a.begin(name(2, 10)) is Begun.STAGING


def test_start_removes_what_the_dead_left_and_nothing_else(
    open_cache: OpenCache, tmp_path: Path
) -> None:
    living = open_cache()
    assert living.begin(name(1, 10)) is Begun.STAGING
    dead = tmp_path / "staging/123-dead"
    (dead / str(name(2, 10)) / "content").mkdir(parents=True)
    (dead / str(name(2, 10)) / "content/part").write_bytes(b"x")
    open_cache()
    assert not dead.exists()
    assert living.staging(name(1, 10)).exists()
    living.publish(name(1, 10))


def test_start_shrinks_to_a_smaller_capacity(open_cache: OpenCache, tmp_path: Path) -> None:
    cache = open_cache(100)
    for number in (1, 2):
        put(cache, name(number, 50))
        used_at(cache, name(number, 50), number)
    cache.close()
    assert not (tmp_path / "staging").exists() or not list((tmp_path / "staging").iterdir())
    open_cache(60)
    assert entries(tmp_path) == [str(name(2, 50))]


def test_foreign_files_in_the_folder_are_left_alone(open_cache: OpenCache, tmp_path: Path) -> None:
    (tmp_path / "entries").mkdir()
    (tmp_path / "entries/README").write_text("mine")
    cache = open_cache(50)
    put(cache, name(1, 50))
    assert (tmp_path / "entries/README").exists()


def test_versions_of_a_location(open_cache: OpenCache) -> None:
    cache = open_cache()
    for version in (1, 2, 3):
        put(cache, name(1, 10, version))
        used_at(cache, name(1, 10, version), version)
    put(cache, name(2, 10))
    assert cache.versions(f"{1:032x}") == [name(1, 10, 3), name(1, 10, 2), name(1, 10, 1)]


def test_a_folder_that_cannot_be_written_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    cache = DiskCache(tmp_path / "file", 100, RealDisk())
    with pytest.raises(LoadFailed, match="cannot prepare the artifact cache") as caught:
        cache.start()
    assert caught.value.code is Code.UNAVAILABLE


@settings(max_examples=30, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["put", "hold", "release"]), st.integers(0, 5)), max_size=25
    )
)
def test_never_over_capacity_and_never_without_what_is_held(
    tmp_path_factory: pytest.TempPathFactory, steps: list[tuple[str, int]]
) -> None:
    directory = tmp_path_factory.mktemp("cache")
    cache = DiskCache(directory, 100, RealDisk())
    cache.start()
    held: list[EntryName] = []
    for step, number in steps:
        entry = name(number, 15 + 10 * number)
        match step:
            case "put":
                try:
                    begun = cache.begin(entry)
                except LoadFailed:
                    in_use = sum(other.size_bytes for other in set(held))
                    assert in_use + entry.size_bytes > 100
                else:
                    if begun is Begun.STAGING:
                        cache.publish(entry)
                    held.append(entry)
            case "hold":
                if cache.try_hold(entry):
                    held.append(entry)
            case "release":
                if entry in held:
                    held.remove(entry)
                    cache.release(entry)
        stored = [EntryName.parse(text) for text in entries(directory)]
        assert sum(other.size_bytes for other in stored if other) <= 100
        assert set(held) <= set(stored)
    cache.close()
