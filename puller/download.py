"""Fills a staging folder with the objects of a manifest: several ranged reads at once.

Owns the workers of one download, as many as ``puller.ramp`` says. A read that breaks off goes on
at the byte where it stopped; what was written stays, and is noted in the journal, from which the
next download of the same artifact goes on. Memory is bounded by chunks times workers, because every
chunk is on the disk before the next is asked for. A file is checked against its MD5 where its ETag
is one (while it arrives, see ``puller.md5``), and against ``SHA256SUMS`` where the artifact brings
that file. Leaves the folder to the caller, also when it fails: with ``LoadFailed``,
``ObjectChangedError``, or an ``OSError`` of the disk.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import logging
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from mesh.core.errors import Code, LoadFailed
from puller.blocking import BlockingPool
from puller.disk import Chunk, Disk
from puller.journal import Journal, Range, missing
from puller.manifest import (
    SHA256SUMS,
    Manifest,
    ManifestFile,
    md5_of,
    parse_sha256sums,
    plan_parts,
    too_large,
)
from puller.md5 import FollowingMd5
from puller.ramp import LOOK_MS, Ramp
from puller.rate import RateLimit
from puller.settings import PullerSettings
from puller.source import Backoff, ObjectChangedError, RemoteSource, TransientSourceError

logger = logging.getLogger(__name__)

_NOTED_BYTES: Final = 4 << 20  # of a read under way: what a killed process loses of each at most

Report = Callable[[int, int | None], None]
Cover = Callable[[int], None]  # reserves room for so many bytes in all; blocks
Part = tuple["_File", int, int | None]


@dataclass(frozen=True, slots=True)
class Means:
    """What the downloads of a process share."""

    settings: PullerSettings
    disk: Disk
    pool: BlockingPool
    slots: asyncio.Semaphore
    rate: RateLimit


@dataclass(slots=True, eq=False)
class _File:
    entry: ManifestFile
    path: Path
    parts_left: int
    present: list[Range]  # from an earlier attempt
    md5: FollowingMd5 | None
    size_bytes: int  # as far as it is known
    opening: asyncio.Lock = field(default_factory=asyncio.Lock)
    descriptor: int | None = None


class Download:
    """``sizes`` tells, after ``run``, what the files came to have."""

    def __init__(
        self,
        source: RemoteSource,
        manifest: Manifest,
        directory: Path,
        uri: str,
        *,
        means: Means,
        journal: Journal,
        report: Report,
        cover: Cover,
    ) -> None:
        self._source = source
        self._manifest = manifest
        self._directory = directory
        self._uri = uri
        self._means = means
        self._settings = means.settings
        self._pool = means.pool
        self._journal = journal
        self._report = report
        self._cover = cover
        self._total_bytes = manifest.size_bytes
        self._done_bytes = 0
        self._files: list[_File] = []
        self._growing: asyncio.Task[None] | None = None

    @property
    def sizes(self) -> dict[str, int]:
        return {file.entry.path: file.size_bytes for file in self._files}

    async def run(self) -> None:
        present = await self._pool.run(self._adopt)
        self._report(self._done_bytes, self._total_bytes)
        parts = self._parts(present)
        self._ramp = Ramp(self._settings.parallelism, asyncio.get_running_loop().time())
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._work(parts))
                self._growing = group.create_task(self._grow(group, parts))
        except BaseExceptionGroup as errors:
            raise _first_cause(errors) from errors
        finally:
            await self._pool.run(self._close_all)
        await self._pool.run(self._check_sha256sums)

    async def _grow(self, group: asyncio.TaskGroup, parts: Iterator[Part]) -> None:
        """Ends with the first worker that finds no part left."""
        loop = asyncio.get_running_loop()
        while True:
            await asyncio.sleep(LOOK_MS / 1000)
            for _ in range(self._ramp.more(loop.time())):
                group.create_task(self._work(parts))

    def _adopt(self) -> dict[str, list[Range]]:
        present = self._journal.read(
            {file.path: file.source.size_bytes for file in self._manifest.files}
        )
        if not present:
            self._journal.forget()
            shutil.rmtree(self._directory, ignore_errors=True)
        self._done_bytes = sum(end - start for one in present.values() for start, end in one)
        if self._done_bytes:
            logger.info("%s: %d bytes are here already", self._uri, self._done_bytes)
        return present

    def _parts(self, present: dict[str, list[Range]]) -> Iterator[Part]:
        for entry in self._manifest.files:
            size_bytes = entry.source.size_bytes
            here = present.get(entry.path, [])
            ranges = self._ranges(entry, here)
            wanted = md5_of(entry.source)
            file = _File(
                entry,
                self._directory / entry.path,
                parts_left=len(ranges),
                present=here,
                md5=None if wanted is None else FollowingMd5(wanted, here),
                size_bytes=size_bytes or 0,
            )
            self._files.append(file)
            for start, end in ranges:
                yield file, start, end

    def _ranges(self, entry: ManifestFile, here: list[Range]) -> list[tuple[int, int | None]]:
        size_bytes = entry.source.size_bytes
        if size_bytes is None or not entry.source.ranges:
            return [(0, size_bytes)]
        found: list[tuple[int, int | None]] = []
        for start, end in missing(here, size_bytes):
            found += plan_parts(end - start, self._settings.part_bytes, start)
        return found or [(size_bytes, size_bytes)]  # nothing to read: the file is finished

    async def _work(self, parts: Iterator[Part]) -> None:
        for file, start, end in parts:  # shared: each part goes to one worker
            async with file.opening:
                if file.descriptor is None:
                    file.descriptor = await self._pool.run(self._open, file)
            if end is None or not file.entry.source.ranges:
                await self._read_whole(file, end)
            else:
                await self._read_part(file, start, end)
                if file.md5 is not None:
                    with self._busy():
                        await file.md5.follow(self._pool, file.descriptor, (start, end))
            file.parts_left -= 1
            if file.parts_left == 0:
                await self._finish(file)
            if self._ramp.one_less(asyncio.get_running_loop().time()):
                return
        if self._growing is not None:
            self._growing.cancel()

    def _open(self, file: _File) -> int:
        if file.present:
            return self._means.disk.reopen(file.path)
        file.path.unlink(missing_ok=True)  # of an earlier attempt, without a byte that counts
        return self._means.disk.create(file.path)

    async def _read_part(self, file: _File, start: int, end: int) -> None:
        backoff = Backoff(self._settings, self._uri)
        offset = noted = start
        name = file.entry.path
        try:
            while offset < end:
                try:
                    async with self._means.slots:
                        async for chunk in self._source.read(file.entry.source, offset, end):
                            if len(chunk) > end - offset:
                                raise TransientSourceError("the store sent more than was asked for")
                            await self._keep(file, chunk, offset)
                            offset += len(chunk)
                            if chunk:
                                backoff.progressed()
                            if offset - noted >= _NOTED_BYTES:
                                await self._pool.run(self._journal.add, name, noted, offset)
                                noted = offset
                            await self._pay(len(chunk))
                    if offset < end:
                        raise TransientSourceError("the store closed the connection early")
                except TransientSourceError as error:
                    await backoff.failed(error)
        finally:
            if offset > noted:
                await self._pool.run(self._journal.add, name, noted, offset)

    async def _read_whole(self, file: _File, size_bytes: int | None) -> None:
        """From a server that gives no part alone: every attempt begins anew."""
        backoff = Backoff(self._settings, self._uri)
        most_bytes = self._settings.max_artifact_bytes
        while True:
            offset = 0
            try:
                async with self._means.slots:
                    async for chunk in self._source.read(file.entry.source, 0, size_bytes):
                        offset += len(chunk)
                        if size_bytes is not None and offset > size_bytes:
                            raise TransientSourceError("the server sent more than it had said")
                        if offset > most_bytes:
                            raise too_large(self._uri, offset, most_bytes)
                        if size_bytes is None:
                            await self._pool.run(self._cover, offset)
                        await self._keep(file, chunk, offset - len(chunk))
                        await self._pay(len(chunk))
                if size_bytes is not None and offset < size_bytes:
                    raise TransientSourceError("the server closed the connection early")
                break
            except TransientSourceError as error:
                self._done_bytes -= offset
                await backoff.failed(error)
        file.size_bytes = offset
        if file.md5 is not None and file.descriptor is not None:
            await file.md5.follow(self._pool, file.descriptor, (0, offset))

    async def _keep(self, file: _File, chunk: Chunk, offset: int) -> None:
        with self._busy():
            await self._pool.run(self._write, file, chunk, offset)
        self._done_bytes += len(chunk)
        self._report(self._done_bytes, self._total_bytes)

    async def _pay(self, size_bytes: int) -> None:
        if self._settings.rate_bytes_per_s == 0:
            return
        with self._busy():  # more reads would not make the limit higher
            await self._means.rate.spend(size_bytes)

    @contextlib.contextmanager
    def _busy(self) -> Iterator[None]:
        clock = asyncio.get_running_loop().time
        began_s = clock()
        try:
            yield
        finally:
            self._ramp.busy_s += clock() - began_s

    def _write(self, file: _File, chunk: Chunk, offset: int) -> None:
        assert file.descriptor is not None
        self._means.disk.write(file.descriptor, chunk, offset)

    async def _finish(self, file: _File) -> None:
        if file.md5 is not None:
            await self._check_md5(file, file.md5)
        await self._pool.run(self._close, file)

    async def _check_md5(self, file: _File, md5: FollowingMd5) -> None:
        """An ETag that looks like an MD5 is none for objects under KMS, and nothing in the reply
        tells. So a difference is tried once more: the same bytes twice are right, whatever the
        ETag is; different bytes were damaged on the way."""
        assert file.descriptor is not None
        first = await md5.result(self._pool, file.descriptor)
        if first == md5.wanted:
            return
        size_bytes = file.size_bytes
        await self._pool.run(self._journal.forget)  # what is here is not worth going on with
        self._done_bytes -= size_bytes
        for start, end in plan_parts(size_bytes, self._settings.part_bytes):
            await self._read_part(file, start, end)
        second = await self._pool.run(_digest, file.path, "md5")
        if second == md5.wanted:
            logger.warning("%s: %s arrived damaged, read again", self._uri, file.entry.path)
        elif second == first:
            logger.info("%s: the ETag of %s is no MD5", self._uri, file.entry.path)
        else:
            await self._pool.run(self._journal.forget)
            raise LoadFailed(
                f"{self._uri}: {file.entry.path!r} arrived damaged twice (MD5 {second}, the "
                f"store says {md5.wanted})",
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

    def _close(self, file: _File) -> None:
        descriptor, file.descriptor = file.descriptor, None
        if descriptor is not None:
            self._means.disk.close(descriptor)

    def _close_all(self) -> None:
        for file in self._files:
            self._close(file)


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
