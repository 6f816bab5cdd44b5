"""An archive on this machine as a source: copied into the cache like any other, then unpacked.

The copy costs a read that the unpacking then has from memory, and makes sure that what is unpacked
is one version of the file. A version is the file's size, time and inode.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from pathlib import Path

from mesh.core.errors import Code, LoadFailed
from puller.disk import Chunk
from puller.location import LocalArchiveLocation
from puller.manifest import Manifest, RemoteObject, single_manifest
from puller.settings import PullerSettings
from puller.source import ObjectChangedError


class LocalArchiveSource:
    """``puller.source.RemoteSource``."""

    def __init__(self, location: LocalArchiveLocation, settings: PullerSettings) -> None:
        self._location = location
        self._path = Path(location.path)
        self._chunk_bytes = settings.chunk_bytes

    async def manifest(self) -> Manifest:
        return single_manifest(await asyncio.to_thread(self._describe), self._location.uri)

    async def read(self, source: RemoteObject, start: int, end: int | None) -> AsyncIterator[Chunk]:
        if await asyncio.to_thread(self._describe) != source:
            raise ObjectChangedError(self._location.uri)
        stop = source.size_bytes if end is None else end
        while stop is not None and start < stop:
            chunk = await asyncio.to_thread(self._read, start, min(self._chunk_bytes, stop - start))
            if not chunk:
                raise ObjectChangedError(self._location.uri)
            yield chunk
            start += len(chunk)

    async def close(self) -> None:
        """Nothing is open between two reads."""

    def _describe(self) -> RemoteObject:
        try:
            info = self._path.stat()
        except OSError as error:
            raise self._failure(error) from error
        version = f"file:{info.st_mtime_ns}:{info.st_ino}"
        return RemoteObject(self._path.name, info.st_size, version)

    def _read(self, start: int, size_bytes: int) -> bytes:
        try:
            with self._path.open("rb") as file:
                return os.pread(file.fileno(), size_bytes, start)
        except OSError as error:
            raise self._failure(error) from error

    def _failure(self, error: OSError) -> LoadFailed:
        return LoadFailed(
            f"{self._location.uri} cannot be read: {error.strerror or error}", code=Code.UNAVAILABLE
        )
