"""A remote artifact's way to the disk, with the faults of a store and of a disk written down."""

from __future__ import annotations

import asyncio
import hashlib
import threading
from pathlib import Path

import pytest

from mesh.core.errors import Code, LoadFailed
from puller.disk import Chunk
from puller.source import TransientSourceError
from tests.puller.conftest import OpenPuller, entries, leftovers, request
from tests.puller.fakes import WAIT_S, FakeDisk, FakeStore, content

URI = "s3://bucket/m"


def two_files() -> FakeStore:
    return FakeStore({"m/big": content(35_000), "m/sub/small": b"abc", "m/empty": b""})


async def test_a_folder_arrives_whole(open_puller: OpenPuller, cache_dir: Path) -> None:
    store = two_files()
    artifact = await open_puller(store).fetch(request(URI))
    assert (artifact.path / "big").read_bytes() == store.objects["m/big"]
    assert (artifact.path / "sub/small").read_bytes() == b"abc"
    assert (artifact.path / "empty").read_bytes() == b""
    assert artifact.path.is_relative_to(cache_dir)
    assert (artifact.size_bytes, artifact.cached, artifact.source) == (35_003, False, URI)
    assert len([read for read in store.reads if read[0] == "m/big"]) == 4
    assert leftovers(cache_dir) == []


async def test_a_single_object_is_a_file_of_its_name(open_puller: OpenPuller) -> None:
    store = FakeStore({"dir/model.onnx": b"model"})
    artifact = await open_puller(store).fetch(request("s3://bucket/dir/model.onnx"))
    assert artifact.path.name == "model.onnx"
    assert artifact.path.read_bytes() == b"model"


async def test_progress_goes_up_to_the_total(open_puller: OpenPuller) -> None:
    seen: list[tuple[int, int | None]] = []
    await open_puller(two_files()).fetch(request(URI), lambda *step: seen.append(step))
    assert seen[0] == (0, 35_003)
    assert seen[-1] == (35_003, 35_003)
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


async def test_the_second_time_it_comes_from_the_cache(open_puller: OpenPuller) -> None:
    store = two_files()
    puller = open_puller(store)
    first = await puller.fetch(request(URI))
    puller.release(first)
    reads = len(store.reads)
    seen: list[tuple[int, int | None]] = []
    second = await puller.fetch(request(URI), lambda *step: seen.append(step))
    assert (second.path, second.cached) == (first.path, True)
    assert len(store.reads) == reads
    assert seen == [(35_003, 35_003)]


async def test_the_cache_outlives_the_process(open_puller: OpenPuller) -> None:
    store = two_files()
    before = open_puller(store)
    await before.fetch(request(URI))
    await before.close()
    assert (await open_puller(store).fetch(request(URI))).cached


async def test_a_changed_source_is_pulled_anew(open_puller: OpenPuller, cache_dir: Path) -> None:
    store = FakeStore({"m": b"old"})
    puller = open_puller(store)
    old = await puller.fetch(request(URI))
    store.objects["m"] = b"new"
    new = await puller.fetch(request(URI))
    assert new.path.read_bytes() == b"new"
    assert old.path.read_bytes() == b"old"  # it is held
    puller.release(old)
    puller.release(new)
    store.objects["m"] = b"newest"
    await puller.fetch(request(URI))
    assert len(entries(cache_dir)) == 1  # what the source no longer has went


async def test_parts_are_read_at_the_same_time(open_puller: OpenPuller) -> None:
    """Nothing passes until as many reads are under way as parallelism says."""
    store = FakeStore({"m": content(80_000)}, gate=asyncio.Event())

    def count(*_: object) -> None:
        if len(store.reads) == 4:
            assert store.gate is not None
            store.gate.set()

    store.before_read = count
    async with asyncio.timeout(WAIT_S):
        await open_puller(store, parallelism=4).fetch(request(URI))


async def test_small_files_are_read_at_the_same_time(open_puller: OpenPuller) -> None:
    store = FakeStore({f"m/{i}": b"x" for i in range(10)}, gate=asyncio.Event())

    def count(*_: object) -> None:
        if len(store.reads) == 4:
            assert store.gate is not None
            store.gate.set()

    store.before_read = count
    async with asyncio.timeout(WAIT_S):
        await open_puller(store, parallelism=4).fetch(request(URI))


async def test_reads_of_all_fetches_together_are_bounded(open_puller: OpenPuller) -> None:
    store = FakeStore({f"m{i}/x": content(50_000, i) for i in range(3)})
    puller = open_puller(store, parallelism=2)
    await asyncio.gather(*(puller.fetch(request(f"s3://bucket/m{i}")) for i in range(3)))
    assert len(store.reads) == 15
    assert store.under_way_most == 2


async def test_memory_is_bounded_by_chunks_in_flight(open_puller: OpenPuller) -> None:
    """No chunk is taken before the one before it is on the disk."""
    store = FakeStore({"m": content(100_000)})
    most = 0

    class Disk(FakeDisk):
        def write(self, descriptor: int, data: Chunk, offset: int) -> None:
            nonlocal most
            most = max(most, store.yielded - self.writes)
            super().write(descriptor, data, offset)

    disk = Disk()
    await open_puller(store, disk, parallelism=3).fetch(request(URI))
    assert 1 <= most <= 3
    assert disk.writes == 100
    assert threading.get_ident() not in disk.threads


async def test_a_dropped_connection_goes_on_where_it_stopped(open_puller: OpenPuller) -> None:
    store = FakeStore({"m": content(30_000)}, chunk_bytes=500)
    dropped: set[int] = set()

    def drop_once(_key: str, start: int, _end: int) -> int | None:
        if start % 10_000 == 0 and start not in dropped:
            dropped.add(start)
            return 7_500
        return None

    store.fault = drop_once
    artifact = await open_puller(store).fetch(request(URI))
    assert artifact.path.read_bytes() == store.objects["m"]
    again = sorted(start for _, start, _ in store.reads if start % 10_000)
    assert again == [7_500, 17_500, 27_500]


async def test_a_line_that_always_drops_but_moves_gets_there(open_puller: OpenPuller) -> None:
    """The count of failures starts anew with every byte of progress."""
    store = FakeStore({"m": content(20_000)}, fault=lambda *_: 1_000)
    artifact = await open_puller(store, attempts_max=2).fetch(request(URI))
    assert artifact.path.read_bytes() == store.objects["m"]


async def test_a_dead_line_is_given_up(open_puller: OpenPuller, cache_dir: Path) -> None:
    store = FakeStore({"m": content(20_000)}, fault=lambda *_: 0)
    with pytest.raises(LoadFailed, match="connection lost, says the test") as caught:
        await open_puller(store, attempts_max=3, parallelism=1).fetch(request(URI))
    assert caught.value.code is Code.UNAVAILABLE
    assert URI in caught.value.message
    assert len(store.reads) == 3
    assert leftovers(cache_dir) == entries(cache_dir) == []


async def test_an_unreachable_store_is_tried_and_given_up(open_puller: OpenPuller) -> None:
    store = FakeStore({"m": b"x"}, manifest_faults=[TransientSourceError("away")] * 3)
    with pytest.raises(LoadFailed, match="away") as caught:
        await open_puller(store, attempts_max=3).fetch(request(URI))
    assert caught.value.code is Code.UNAVAILABLE
    store.manifest_faults = [TransientSourceError("away")] * 2
    await open_puller(store, attempts_max=3).fetch(request(URI))
    assert store.manifests == 6


async def test_the_cache_serves_while_the_store_is_away(open_puller: OpenPuller) -> None:
    store = FakeStore({"m": b"x"})
    puller = open_puller(store, attempts_max=1)
    puller.release(await puller.fetch(request(URI)))
    store.manifest_faults = [TransientSourceError("away")]
    artifact = await puller.fetch(request(URI))
    assert artifact.cached
    assert artifact.path.read_bytes() == b"x"


async def test_the_cache_does_not_serve_whom_the_store_refuses(open_puller: OpenPuller) -> None:
    store = FakeStore({"m": b"x"})
    puller = open_puller(store)
    puller.release(await puller.fetch(request(URI)))
    store.manifest_faults = [LoadFailed("refused")]
    with pytest.raises(LoadFailed, match="refused"):
        await puller.fetch(request(URI))


async def test_an_object_that_changes_while_it_is_read_begins_anew(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = FakeStore({"m": content(40_000, seed=1)})
    new = content(45_000, seed=2)

    def change(_key: str, start: int, _end: int) -> None:
        if len(store.reads) == 3:
            store.objects["m"] = new

    store.before_read = change
    artifact = await open_puller(store, parallelism=1).fetch(request(URI))
    assert artifact.path.read_bytes() == new
    assert artifact.size_bytes == 45_000
    assert leftovers(cache_dir) == []
    assert len(entries(cache_dir)) == 1


async def test_an_object_that_never_rests_is_given_up(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = FakeStore({"m": b"0"})
    store.before_read = lambda *_: store.objects.update(m=str(len(store.reads)).encode())
    with pytest.raises(LoadFailed, match="changes faster") as caught:
        await open_puller(store, changed_restarts_max=2).fetch(request(URI))
    assert caught.value.code is Code.UNAVAILABLE
    assert store.manifests == 3
    assert leftovers(cache_dir) == entries(cache_dir) == []


async def test_a_damaged_file_is_read_again(open_puller: OpenPuller) -> None:
    store = FakeStore({"m/a": content(25_000), "m/b": b"b"}, damage=["m/a"])
    artifact = await open_puller(store).fetch(request(URI))
    assert (artifact.path / "a").read_bytes() == store.objects["m/a"]
    assert len([key for key, _, _ in store.reads if key == "m/a"]) == 6


async def test_a_file_damaged_differently_twice_fails(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = FakeStore({"m": content(30_000)}, damage=["m", "m", "m", "m"])
    with pytest.raises(LoadFailed, match="arrived damaged twice") as caught:
        await open_puller(store).fetch(request(URI))
    assert caught.value.code is Code.UNAVAILABLE
    assert leftovers(cache_dir) == entries(cache_dir) == []


async def test_an_etag_that_is_no_md5_is_believed_after_a_second_look(
    open_puller: OpenPuller,
) -> None:
    store = FakeStore({"m": content(1_000)}, etags={"m": f'"{"0" * 32}"'})
    artifact = await open_puller(store).fetch(request(URI))
    assert artifact.path.read_bytes() == store.objects["m"]
    assert len(store.reads) == 2


async def test_sha256sums_are_checked(open_puller: OpenPuller, cache_dir: Path) -> None:
    digest = hashlib.sha256(b"model").hexdigest()
    store = FakeStore({"m/model": b"model", "m/SHA256SUMS": f"{digest}  model\n".encode()})
    artifact = await open_puller(store).fetch(request(URI))
    assert (artifact.path / "model").read_bytes() == b"model"
    store.objects["m/model"] = b"other"
    with pytest.raises(LoadFailed, match="'model' is corrupt") as caught:
        await open_puller(store).fetch(request(URI))
    assert caught.value.code is Code.FAILED_PRECONDITION
    del store.objects["m/model"]
    with pytest.raises(LoadFailed, match="lists 'model', which is missing"):
        await open_puller(store).fetch(request(URI))
    assert leftovers(cache_dir) == []


async def test_a_disk_that_fills_up_leaves_nothing(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = two_files()
    disk = FakeDisk(full_after_bytes=20_000)
    puller = open_puller(store, disk)
    with pytest.raises(LoadFailed, match="disk full") as caught:
        await puller.fetch(request(URI))
    assert caught.value.code is Code.UNAVAILABLE
    assert str(cache_dir) in caught.value.message
    assert leftovers(cache_dir) == entries(cache_dir) == []
    disk.full_after_bytes = None
    assert not (await puller.fetch(request(URI))).cached  # and it heals


async def test_a_disk_without_room_is_seen_before_the_first_byte(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = two_files()
    with pytest.raises(LoadFailed, match="disk full") as caught:
        await open_puller(store, FakeDisk(free_bytes=100)).fetch(request(URI))
    assert caught.value.code is Code.UNAVAILABLE
    assert store.reads == []
    assert leftovers(cache_dir) == []


async def test_an_artifact_larger_than_the_cache_or_the_bound(open_puller: OpenPuller) -> None:
    store = two_files()
    with pytest.raises(LoadFailed, match="more than the whole artifact cache") as caught:
        await open_puller(store, cache_capacity_bytes=35_002).fetch(request(URI))
    assert caught.value.code is Code.FAILED_PRECONDITION
    with pytest.raises(LoadFailed, match="that an artifact may have") as caught:
        await open_puller(store, max_artifact_bytes=35_002).fetch(request(URI))
    assert caught.value.code is Code.FAILED_PRECONDITION
    assert store.reads == []


async def test_a_damaged_cache_entry_is_pulled_again(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = two_files()
    puller = open_puller(store)
    artifact = await puller.fetch(request(URI))
    puller.release(artifact)
    (artifact.path / "big").write_bytes(b"cut off")
    again = await puller.fetch(request(URI))
    assert not again.cached
    assert (again.path / "big").read_bytes() == store.objects["m/big"]


async def test_a_damaged_entry_that_another_uses_is_not_waited_for(
    open_puller: OpenPuller,
) -> None:
    store = two_files()
    artifact = await open_puller(store).fetch(request(URI))  # and it holds on to it
    (artifact.path / "big").write_bytes(b"cut off")
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(LoadFailed, match="is damaged, and another process uses it") as caught:
            await open_puller(store).fetch(request(URI))
    assert caught.value.code is Code.UNAVAILABLE


async def test_a_fetch_that_takes_too_long_is_given_up(
    open_puller: OpenPuller, cache_dir: Path
) -> None:
    store = FakeStore({"m": b"x"}, gate=asyncio.Event())
    async with asyncio.timeout(WAIT_S):
        with pytest.raises(LoadFailed, match="was not here within 50 ms") as caught:
            await open_puller(store, fetch_timeout_ms=50).fetch(request(URI))
    assert caught.value.code is Code.UNAVAILABLE
    assert leftovers(cache_dir) == []
