"""A remote store and a disk whose faults are written down beforehand."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import threading
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path

from puller.disk import Chunk, RealDisk
from puller.location import S3Location
from puller.manifest import Manifest, RemoteObject, folder_manifest, single_manifest
from puller.source import ObjectChangedError, TransientSourceError

WAIT_S = 60.0  # of a test that would otherwise hang; nothing is measured with it


def content(size_bytes: int, seed: int = 0) -> bytes:
    """Bytes in which no two parts are alike."""
    out = bytearray()
    block = 0
    while len(out) < size_bytes:
        out += hashlib.sha256(f"{seed}/{block}".encode()).digest()
        block += 1
    return bytes(out[:size_bytes])


def etag_of(data: bytes) -> str:
    return f'"{hashlib.md5(data, usedforsecurity=False).hexdigest()}"'


# One fault: is asked at every read, with (key, start, end); gives how many bytes may pass before
# the connection breaks, or None to let the read be.
Fault = Callable[[str, int, int], int | None]


@dataclass
class FakeStore:
    """Objects of one bucket; ``open`` is what the puller is given."""

    objects: dict[str, bytes] = field(default_factory=dict)
    etags: dict[str, str] = field(default_factory=dict)  # instead of the MD5
    fault: Fault = lambda key, start, end: None
    manifest_faults: list[Exception] = field(default_factory=list)  # one for each call
    before_read: Callable[[str, int, int], object] | None = None
    damage: list[str] = field(default_factory=list)  # keys whose next read is damaged
    chunk_bytes: int = 1000
    reads: list[tuple[str, int, int]] = field(default_factory=list)
    manifests: int = 0
    gate: asyncio.Event | None = None  # reads wait for it
    reading: asyncio.Event = field(default_factory=asyncio.Event)  # set at the first read
    yielded: int = 0  # chunks given out
    under_way: int = 0  # reads at this moment
    under_way_most: int = 0

    def open(self, location: S3Location) -> FakeSource:
        return FakeSource(self, location)

    def describe(self, key: str) -> RemoteObject:
        data = self.objects[key]
        return RemoteObject(key, len(data), self.etags.get(key) or etag_of(data))


@dataclass
class FakeSource:
    store: FakeStore
    location: S3Location

    async def manifest(self) -> Manifest:
        self.store.manifests += 1
        if self.store.manifest_faults:
            raise self.store.manifest_faults.pop(0)
        prefix, uri = self.location.prefix, self.location.uri
        if prefix in self.store.objects:
            return single_manifest(self.store.describe(prefix), uri)
        keys = [key for key in self.store.objects if key.startswith(prefix)]
        manifest = folder_manifest(prefix, [self.store.describe(key) for key in keys], uri)
        assert manifest is not None
        return manifest

    async def close(self) -> None:
        pass

    async def read(self, source: RemoteObject, start: int, end: int | None) -> AsyncIterator[bytes]:
        store = self.store
        if end is None:
            end = len(store.objects[source.key])
        store.reads.append((source.key, start, end))
        store.reading.set()
        if store.before_read is not None:
            store.before_read(source.key, start, end)
        store.under_way += 1
        store.under_way_most = max(store.under_way_most, store.under_way)
        try:
            if store.gate is not None:
                await store.gate.wait()
            async for chunk in self._pieces(source, start, end):
                yield chunk
        finally:
            store.under_way -= 1

    async def _pieces(self, source: RemoteObject, start: int, end: int) -> AsyncIterator[bytes]:
        store = self.store
        if store.describe(source.key).etag != source.etag:
            raise ObjectChangedError(source.key)
        data = store.objects[source.key][start:end]
        if source.key in store.damage:
            store.damage.remove(source.key)
            data = bytes(len(data))
        allowed = store.fault(source.key, start, end)
        passed = data if allowed is None else data[:allowed]
        for at in range(0, len(passed), store.chunk_bytes):
            await asyncio.sleep(0)
            store.yielded += 1
            yield passed[at : at + store.chunk_bytes]
        if allowed is not None:
            raise TransientSourceError("connection lost, says the test")


class FakeDisk(RealDisk):
    """The real disk, until ``full_after_bytes`` were written."""

    def __init__(
        self, *, full_after_bytes: int | None = None, free_bytes: int | None = None
    ) -> None:
        self.full_after_bytes = full_after_bytes
        self.stated_free_bytes = free_bytes
        self.written_bytes = 0
        self.writes = 0
        self.threads: set[int] = set()
        self._lock = threading.Lock()

    def free_bytes(self, directory: Path) -> int:
        if self.stated_free_bytes is not None:
            return self.stated_free_bytes
        return super().free_bytes(directory)

    def write(self, descriptor: int, data: Chunk, offset: int) -> None:
        with self._lock:
            self.threads.add(threading.get_ident())
            self.writes += 1
            self.written_bytes += len(data)
            limit = self.full_after_bytes
            if limit is not None and self.written_bytes > limit:
                raise OSError(errno.ENOSPC, "No space left on device")
        super().write(descriptor, data, offset)
