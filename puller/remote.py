"""One fetch of a remote artifact: ask the source, look into the cache, else download and publish.

Owns the order of these steps and what happens when one fails: a store that cannot be reached is
answered from the cache where it can be, an object that changed begins anew, and what a download
that broke off had brought is kept aside for the next one. An artifact that is one archive becomes
the folder that it unpacks to. Returns a held entry. An entry is published before the disk has it
for sure, so that a load need not wait for that; until it has, the entry counts only as long as the
machine is up.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Final

import orjson

from mesh.artifacts import Artifact
from mesh.core.errors import Code, LoadFailed
from puller.archive import Bounds, is_archive, unpack
from puller.blocking import BlockingPool
from puller.cache import Begun, DiskCache, EntryName, disk_full
from puller.disk import Disk, is_full
from puller.download import Download, Means
from puller.journal import JOURNAL, Journal, boot_id
from puller.location import RemoteLocation
from puller.manifest import Manifest, check_bounds
from puller.rate import RateLimit
from puller.settings import PullerSettings
from puller.source import Backoff, ObjectChangedError, OpenSource, RemoteSource, retried

logger = logging.getLogger(__name__)

Report = Callable[[int, int | None], None]

_BUSY_POLL_MS: Final = 50  # another process is downloading the same: seconds, usually
_DAMAGED_MAX: Final = 5  # looks at an entry that is damaged and cannot be removed
_UNKNOWN_BYTES: Final = 1 << 20  # reserved at first for what does not tell its size
_DESCRIPTION: Final = "artifact.json"
_SYNCED: Final = "synced"  # there when the disk has the entry for sure
_CONTENT: Final = "content"
_PACKED: Final = "packed"  # an archive on its way


class RemoteFetcher:
    def __init__(
        self,
        settings: PullerSettings,
        cache: DiskCache,
        pool: BlockingPool,
        disk: Disk,
        open_source: OpenSource,
    ) -> None:
        self._settings = settings
        self._cache = cache
        self._pool = pool
        self._disk = disk
        self._open_source = open_source
        slots = asyncio.Semaphore(settings.parallelism)
        self._means = Means(settings, disk, pool, slots, RateLimit(settings.rate_bytes_per_s))
        self._syncing: set[asyncio.Task[None]] = set()

    async def fetch(self, location: RemoteLocation, report: Report) -> tuple[EntryName, Artifact]:
        """Bounded by ``fetch_timeout_ms``. The entry is held once."""
        # In a thread: it imports a library and reads certificates.
        source = await self._pool.run(self._open_source, location)
        try:
            return await self._fetch_from(source, location, report)
        finally:
            await source.close()

    async def version(self, location: RemoteLocation) -> str:
        """Changes whenever the artifact does."""
        source = await self._pool.run(self._open_source, location)
        try:
            manifest = await retried(source.manifest, Backoff(self._settings, location.uri))
            return manifest.version
        finally:
            await source.close()

    async def close(self) -> None:
        for task in self._syncing:
            task.cancel()
        await asyncio.gather(*self._syncing, return_exceptions=True)

    async def _fetch_from(
        self, source: RemoteSource, location: RemoteLocation, report: Report
    ) -> tuple[EntryName, Artifact]:
        deadline = asyncio.get_running_loop().time() + self._settings.fetch_timeout_ms / 1000
        for _ in range(self._settings.changed_restarts_max + 1):
            try:
                async with asyncio.timeout_at(deadline):
                    manifest = await retried(source.manifest, Backoff(self._settings, location.uri))
            except ObjectChangedError:
                continue
            except (LoadFailed, TimeoutError) as error:
                failure = error if isinstance(error, LoadFailed) else self._timed_out(location)
                stale = await self._from_cache_alone(location, failure)
                if stale is None:
                    raise failure from error
                return stale
            check_bounds(manifest, location.uri, max_bytes=self._settings.max_artifact_bytes)
            making = _Making(location, source, manifest, report, deadline)
            try:
                return await self._obtain(making)
            except ObjectChangedError:
                logger.info("%s changed while it was read; begun anew", location.uri)
        raise LoadFailed(
            f"{location.uri} changes faster than it can be read "
            f"(begun {self._settings.changed_restarts_max + 1} times)",
            code=Code.UNAVAILABLE,
        )

    async def _obtain(self, making: _Making) -> tuple[EntryName, Artifact]:
        location, report = making.location, making.report
        damaged = 0
        while asyncio.get_running_loop().time() < making.deadline:
            name = await self._pool.run(self._entry_of, making)
            # Hits first and alone: they do not wait for whoever changes what the cache holds.
            held = await self._pool.run(self._cache.try_hold, name)
            match Begun.PRESENT if held else await self._pool.run(self._cache.begin, name):
                case Begun.PRESENT:
                    artifact = await self._checked_entry(name)
                    if artifact is not None:
                        report(artifact.size_bytes, artifact.size_bytes)
                        return name, artifact
                    damaged += 1
                    if damaged > _DAMAGED_MAX:
                        raise LoadFailed(
                            f"{location.uri}: its cache entry {self._cache.content(name)} is "
                            "damaged, and another process uses it; stop that, or remove the entry",
                            code=Code.UNAVAILABLE,
                        )
                    await asyncio.sleep(_BUSY_POLL_MS / 1000)
                case Begun.BUSY:
                    await asyncio.sleep(_BUSY_POLL_MS / 1000)
                case Begun.STAGING:
                    name = await self._make(name, making)
                    artifact = await self._pool.run(self._read_entry, name, cached=False)
                    assert artifact is not None
                    return name, artifact
        raise self._timed_out(location)

    def _entry_of(self, making: _Making) -> EntryName:
        """Under the name that a complete entry has, if there is one: what an archive or a file of
        unknown size comes to have is not known before."""
        location, version = making.digest, making.manifest.version
        size_bytes = making.manifest.size_bytes
        if making.packed or size_bytes is None:
            for name in self._cache.versions(location):
                if name.version == version:
                    return name
        return EntryName(location, version, _UNKNOWN_BYTES if size_bytes is None else size_bytes)

    async def _make(self, name: EntryName, making: _Making) -> EntryName:
        try:
            final = await self._fill(name, making)
            await self._pool.run(self._cache.publish, name, final)
        except TimeoutError as error:  # an OSError by birth, and not the disk's
            await self._pool.run(self._cache.set_aside, name)
            raise self._timed_out(making.location) from error
        except OSError as error:
            # Asked before the partial artifact goes, or there would seem to be room.
            failure = await self._pool.run(self._disk_failure, name, error)
            await self._pool.run(self._cache.abandon, name)
            raise failure from error
        except (LoadFailed, asyncio.CancelledError) as error:
            heals = not isinstance(error, LoadFailed) or error.code is Code.UNAVAILABLE
            leave = self._cache.set_aside if heals else self._cache.abandon
            await self._pool.run(leave, name)
            raise
        except BaseException:
            await self._pool.run(self._cache.abandon, name)
            raise
        if self._settings.fsync:
            task = asyncio.create_task(self._sync(final))
            self._syncing.add(task)
            task.add_done_callback(self._syncing.discard)
        await self._pool.run(self._drop_other_versions, final)
        return final

    async def _fill(self, name: EntryName, making: _Making) -> EntryName:
        """Everything that the entry has, in its staging folder; its name when it is complete."""
        staging = self._cache.staging(name)
        folder = _PACKED if making.packed else _CONTENT
        cover = partial(self._cache.cover, name)
        journal = Journal(staging, folder)
        uri = making.location.uri
        download = Download(
            making.source,
            making.manifest,
            staging / folder,
            uri,
            means=self._means,
            journal=journal,
            report=making.report,
            cover=cover,
        )
        async with asyncio.timeout_at(making.deadline):
            await download.run()
        sizes, single = download.sizes, making.manifest.single
        if making.packed:
            await self._pool.run(journal.forget)  # a bad archive is not worth keeping
            archive = staging / folder / next(iter(sizes))
            bounds = Bounds(
                self._settings.max_artifact_bytes,
                self._settings.max_artifact_files,
                self._settings.max_unpack_ratio,
            )
            content = staging / _CONTENT
            sizes = await self._pool.run(
                unpack, archive, content, uri, bounds=bounds, disk=self._disk, cover=cover
            )
            single = False
        await self._pool.run(_describe, staging, uri, sizes, single=single)
        return EntryName(name.location, name.version, sum(sizes.values()))

    async def _sync(self, name: EntryName) -> None:
        try:
            await self._pool.run(self._sync_files, self._cache.content(name))
        except OSError as error:  # evicted meanwhile, or the disk is failing: loads will tell
            logger.debug("%s was not synced: %s", name, error)

    def _sync_files(self, entry: Path) -> None:
        description = orjson.loads((entry / _DESCRIPTION).read_bytes())
        for file in description["files"]:
            descriptor = self._disk.reopen(entry / _CONTENT / file)
            try:
                self._disk.sync(descriptor)
            finally:
                self._disk.close(descriptor)
        (entry / _SYNCED).touch()

    async def _from_cache_alone(
        self, location: RemoteLocation, failure: LoadFailed
    ) -> tuple[EntryName, Artifact] | None:
        """What was pulled before, when the store is away. Not when it refused us."""
        if failure.code is not Code.UNAVAILABLE:
            return None
        for packed in (False, True):
            digest = _location_digest(location, packed=packed)
            for name in await self._pool.run(self._cache.versions, digest):
                if await self._pool.run(self._cache.try_hold, name):
                    artifact = await self._checked_entry(name)
                    if artifact is not None:
                        logger.warning("%s; the copy in the cache serves", failure.message)
                        return name, artifact
        return None

    async def _checked_entry(self, name: EntryName) -> Artifact | None:
        """The held entry, or None after removing one that is not what it should be."""
        artifact = await self._pool.run(self._read_entry, name, cached=True)
        if artifact is None:
            logger.warning("cache entry %s is damaged and is removed", name)
            self._cache.release(name)
            await self._pool.run(self._cache.discard, name)
        return artifact

    def _read_entry(self, name: EntryName, *, cached: bool) -> Artifact | None:
        entry = self._cache.content(name)
        try:
            description = orjson.loads((entry / _DESCRIPTION).read_bytes())
            if description["boot"] != boot_id() and not (entry / _SYNCED).exists():
                return None  # the machine went down before the disk had it
            files: dict[str, int] = description["files"]
            path = entry / _CONTENT
            for file, size_bytes in files.items():
                if (path / file).stat().st_size != size_bytes:
                    return None
            if description["single"]:
                path = path / next(iter(files))
            return Artifact(path, name.size_bytes, str(description["source"]), cached)
        except (OSError, orjson.JSONDecodeError, KeyError, TypeError, StopIteration):
            return None

    def _drop_other_versions(self, name: EntryName) -> None:
        """Nobody asks for a version that the source no longer has; its room is worth more."""
        try:
            for other in self._cache.versions(name.location):
                if other != name:
                    self._cache.discard(other)
        except LoadFailed as error:  # they go by their last use, then
            logger.warning("old versions stay in the cache: %s", error.message)

    def _disk_failure(self, name: EntryName, error: OSError) -> LoadFailed:
        directory = self._settings.cache_dir
        if is_full(error):
            return disk_full(directory, name.size_bytes, self._disk.free_bytes(directory))
        return LoadFailed(
            f"the artifact cannot be written to {directory}: {error.strerror or error}",
            code=Code.UNAVAILABLE,
        )

    def _timed_out(self, location: RemoteLocation) -> LoadFailed:
        return LoadFailed(
            f"{location.uri} was not here within {self._settings.fetch_timeout_ms} ms",
            code=Code.UNAVAILABLE,
        )


class _Making:
    """One attempt at one version of an artifact."""

    def __init__(
        self,
        location: RemoteLocation,
        source: RemoteSource,
        manifest: Manifest,
        report: Report,
        deadline: float,
    ) -> None:
        self.location = location
        self.source = source
        self.manifest = manifest
        self.report = report
        self.deadline = deadline
        self.packed = manifest.single and is_archive(manifest.files[0].path)
        self.digest = _location_digest(location, packed=self.packed)


def _location_digest(location: RemoteLocation, *, packed: bool) -> str:
    identity = (*location.identity, "unpacked") if packed else location.identity
    return hashlib.blake2b(repr(identity).encode(), digest_size=16).hexdigest()


def _describe(staging: Path, uri: str, sizes: dict[str, int], *, single: bool) -> None:
    """Says what is in the entry, and takes away what was only for its making."""
    (staging / JOURNAL).unlink(missing_ok=True)
    if (staging / _PACKED).is_dir():
        for path in (staging / _PACKED).iterdir():
            path.unlink()
        (staging / _PACKED).rmdir()
    description = {"source": uri, "single": single, "files": sizes, "boot": boot_id()}
    (staging / _DESCRIPTION).write_bytes(orjson.dumps(description))
