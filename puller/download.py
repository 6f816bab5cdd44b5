"""Fills a staging folder with the objects of a manifest: several ranged reads at once.

Owns the workers of one download. A read that breaks off goes on at the byte where it stopped;
what was written stays. Memory is bounded by chunks times workers, because every chunk is on the
disk before the next is asked for. A file is checked against its MD5 where its ETag is one, and
against ``SHA256SUMS`` where the artifact brings that file. Leaves the folder to the caller, also
when it fails: with ``LoadFailed``, ``ObjectChangedError``, or an ``OSError`` of the disk.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from mesh.core.errors import Code, LoadFailed
from puller.blocking import BlockingPool
from puller.disk import Disk
from puller.manifest import (
    SHA256SUMS,
    Manifest,
    ManifestFile,
    md5_of,
    parse_sha256sums,
    plan_parts,
)
from puller.settings import PullerSettings
from puller.source import Backoff, ObjectChangedError, RemoteSource, TransientSourceError

logger = logging.getLogger(__name__)

Report = Callable[[int, int | None], None]
Part = tuple["_File", int, int]


@dataclass(slots=True, eq=False)
class _File:
    entry: ManifestFile
    path: Path
    parts_left: int
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    descriptor: int | None = None


class Download:
    def __init__(
        self,
        source: RemoteSource,
        manifest: Manifest,
        directory: Path,
        uri: str,
        *,
        settings: PullerSettings,
        disk: Disk,
        pool: BlockingPool,
        slots: asyncio.Semaphore,
        report: Report,
    ) -> None:
        self._source = source
        self._manifest = manifest
        self._directory = directory
        self._uri = uri
        self._settings = settings
        self._disk = disk
        self._pool = pool
        self._slots = slots  # shared by all downloads of the process
        self._report = report
        self._total_bytes = manifest.size_bytes
        self._done_bytes = 0
        self._files: list[_File] = []

    async def run(self) -> None:
        self._report(0, self._total_bytes)
        parts = self._parts()
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(self._settings.parallelism):
                    group.create_task(self._work(parts))
        except BaseExceptionGroup as errors:
            raise _first_cause(errors) from errors
        finally:
            await self._pool.run(self._close_all)
        await self._pool.run(self._check_sha256sums)

    def _parts(self) -> Iterator[Part]:
        for entry in self._manifest.files:
            ranges = plan_parts(entry.source.size_bytes, self._settings.part_bytes) or [(0, 0)]
            file = _File(entry, self._directory / entry.path, parts_left=len(ranges))
            self._files.append(file)
            for start, end in ranges:
                yield file, start, end

    async def _work(self, parts: Iterator[Part]) -> None:
        for file, start, end in parts:  # shared: each part goes to one worker
            async with file.opening:
                if file.descriptor is None:
                    file.descriptor = await self._pool.run(self._disk.create, file.path)
            await self._read_part(file, start, end)
            file.parts_left -= 1
            if file.parts_left == 0:
                await self._finish(file)

    async def _read_part(self, file: _File, start: int, end: int) -> None:
        backoff = Backoff(self._settings, self._uri)
        offset = start
        while offset < end:
            try:
                async with self._slots:
                    async for chunk in self._source.read(file.entry.source, offset, end):
                        if len(chunk) > end - offset:
                            raise TransientSourceError("the store sent more than was asked for")
                        await self._pool.run(self._write, file, chunk, offset)
                        offset += len(chunk)
                        self._done_bytes += len(chunk)
                        self._report(self._done_bytes, self._total_bytes)
                        if chunk:
                            backoff.progressed()
                if offset < end:
                    raise TransientSourceError("the store closed the connection early")
            except TransientSourceError as error:
                await backoff.failed(error)

    def _write(self, file: _File, chunk: bytes, offset: int) -> None:
        assert file.descriptor is not None
        self._disk.write(file.descriptor, chunk, offset)

    async def _finish(self, file: _File) -> None:
        wanted = md5_of(file.entry.source)
        if wanted is not None:
            await self._check_md5(file, wanted)
        await self._pool.run(self._close, file, sync=self._settings.fsync)

    async def _check_md5(self, file: _File, wanted: str) -> None:
        """An ETag that looks like an MD5 is none for objects under KMS, and nothing in the reply
        tells. So a difference is tried once more: the same bytes twice are right, whatever the
        ETag is; different bytes were damaged on the way."""
        first = await self._pool.run(_digest, file.path, "md5")
        if first == wanted:
            return
        size_bytes = file.entry.source.size_bytes
        self._done_bytes -= size_bytes
        for start, end in plan_parts(size_bytes, self._settings.part_bytes):
            await self._read_part(file, start, end)
        second = await self._pool.run(_digest, file.path, "md5")
        if second == wanted:
            logger.warning("%s: %s arrived damaged, read again", self._uri, file.entry.path)
        elif second == first:
            logger.info("%s: the ETag of %s is no MD5", self._uri, file.entry.path)
        else:
            raise LoadFailed(
                f"{self._uri}: {file.entry.path!r} arrived damaged twice (MD5 {second}, the "
                f"store says {wanted})",
                code=Code.UNAVAILABLE,
            )

    def _check_sha256sums(self) -> None:
        listed = self._directory / SHA256SUMS
        if self._manifest.single or not listed.is_file():
            return
        sums = parse_sha256sums(listed.read_text("utf-8", errors="replace"), self._uri)
        present = {entry.path for entry in self._manifest.files}
        for name, wanted in sums.items():
            if name not in present:
                raise LoadFailed(f"{self._uri}: {SHA256SUMS} lists {name!r}, which is missing")
            actual = _digest(self._directory / name, "sha256")
            if actual != wanted:
                raise LoadFailed(
                    f"{self._uri}: {name!r} is corrupt: its SHA-256 is {actual}, "
                    f"{SHA256SUMS} says {wanted}"
                )

    def _close(self, file: _File, *, sync: bool) -> None:
        descriptor, file.descriptor = file.descriptor, None
        if descriptor is not None:
            self._disk.close(descriptor, sync=sync)

    def _close_all(self) -> None:
        for file in self._files:
            self._close(file, sync=False)


def _digest(path: Path, algorithm: str) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(
            file, lambda: hashlib.new(algorithm, usedforsecurity=False)
        ).hexdigest()


def _first_cause(errors: BaseExceptionGroup) -> BaseException:
    """The error that speaks for the group: what will not heal before what may."""
    leaves: list[BaseException] = []
    pending: list[BaseException] = [errors]
    while pending:
        error = pending.pop(0)
        if isinstance(error, BaseExceptionGroup):
            pending.extend(error.exceptions)
        else:
            leaves.append(error)
    for kind in (ObjectChangedError, OSError, LoadFailed):
        for error in leaves:
            if isinstance(error, kind):
                return error
    return leaves[0]
