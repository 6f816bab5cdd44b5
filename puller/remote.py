"""One fetch of a remote artifact: ask the source, look into the cache, else download and publish.

Owns the order of these steps and what happens when one fails: a store that cannot be reached is
answered from the cache where it can be, an object that changed begins anew, and a download that
fails for any reason leaves nothing on the disk. Returns a held entry.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import threading
from collections.abc import Callable
from pathlib import Path

import orjson

from mesh.artifacts import Artifact
from mesh.core.errors import Code, LoadFailed
from puller.blocking import BlockingPool
from puller.cache import Begun, DiskCache, EntryName, disk_full
from puller.disk import Disk, is_full
from puller.download import Download
from puller.location import S3Location
from puller.manifest import Manifest, check_bounds
from puller.settings import PullerSettings
from puller.source import Backoff, ObjectChangedError, OpenSource, RemoteSource, retried

logger = logging.getLogger(__name__)

Report = Callable[[int, int | None], None]

_BUSY_POLL_MS = 50  # another process is downloading the same: seconds, usually
_DAMAGED_MAX = 5  # looks at an entry that is damaged and cannot be removed
_DESCRIPTION = "artifact.json"
_CONTENT = "content"


def open_backend(settings: PullerSettings) -> OpenSource:
    """Opens sources with the back end of their kind; its library comes with the first of them."""
    backends: list[OpenSource] = []
    importing = threading.Lock()

    def open_it(location: S3Location) -> RemoteSource:
        with importing:
            if not backends:
                from puller.s3 import S3Stores

                backends.append(S3Stores(settings).open)
        return backends[0](location)

    return open_it


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
        self._slots = asyncio.Semaphore(settings.parallelism)

    async def fetch(self, location: S3Location, report: Report) -> tuple[EntryName, Artifact]:
        """Bounded by ``fetch_timeout_ms``. The entry is held once."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._settings.fetch_timeout_ms / 1000
        # In a thread: it imports a library and reads certificates.
        source = await self._pool.run(self._open_source, location)
        for _ in range(self._settings.changed_restarts_max + 1):
            try:
                async with asyncio.timeout_at(deadline):
                    manifest = await retried(source.manifest, Backoff(self._settings, location.uri))
            except (LoadFailed, TimeoutError) as error:
                failure = error if isinstance(error, LoadFailed) else self._timed_out(location)
                stale = await self._from_cache_alone(location, failure)
                if stale is None:
                    raise failure from error
                return stale
            check_bounds(manifest, location.uri, max_bytes=self._settings.max_artifact_bytes)
            try:
                return await self._obtain(location, source, manifest, report, deadline)
            except ObjectChangedError:
                logger.info("%s changed while it was read; begun anew", location.uri)
        raise LoadFailed(
            f"{location.uri} changes faster than it can be read "
            f"(begun {self._settings.changed_restarts_max + 1} times)",
            code=Code.UNAVAILABLE,
        )

    async def _obtain(
        self,
        location: S3Location,
        source: RemoteSource,
        manifest: Manifest,
        report: Report,
        deadline: float,
    ) -> tuple[EntryName, Artifact]:
        name = EntryName(_location_digest(location), manifest.version, manifest.size_bytes)
        damaged = 0
        while asyncio.get_running_loop().time() < deadline:
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
                    await self._make(name, location, source, manifest, report, deadline)
                    artifact = await self._pool.run(self._read_entry, name, cached=False)
                    assert artifact is not None
                    return name, artifact
        raise self._timed_out(location)

    async def _make(
        self,
        name: EntryName,
        location: S3Location,
        source: RemoteSource,
        manifest: Manifest,
        report: Report,
        deadline: float,
    ) -> None:
        staging = self._cache.staging(name)
        download = Download(
            source,
            manifest,
            staging / _CONTENT,
            location.uri,
            settings=self._settings,
            disk=self._disk,
            pool=self._pool,
            slots=self._slots,
            report=report,
        )
        try:
            async with asyncio.timeout_at(deadline):
                await download.run()
            await self._pool.run(_describe, staging, location.uri, manifest)
            await self._pool.run(self._cache.publish, name)
        except TimeoutError as error:  # an OSError by birth, and not the disk's
            await self._pool.run(self._cache.abandon, name)
            raise self._timed_out(location) from error
        except OSError as error:
            # Asked before the partial artifact goes, or there would seem to be room.
            failure = await self._pool.run(self._disk_failure, name, error)
            await self._pool.run(self._cache.abandon, name)
            raise failure from error
        except BaseException:
            await self._pool.run(self._cache.abandon, name)
            raise
        await self._pool.run(self._drop_other_versions, name)

    async def _from_cache_alone(
        self, location: S3Location, failure: LoadFailed
    ) -> tuple[EntryName, Artifact] | None:
        """What was pulled before, when the store is away. Not when it refused us."""
        if failure.code is not Code.UNAVAILABLE:
            return None
        for name in await self._pool.run(self._cache.versions, _location_digest(location)):
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

    def _timed_out(self, location: S3Location) -> LoadFailed:
        return LoadFailed(
            f"{location.uri} was not here within {self._settings.fetch_timeout_ms} ms",
            code=Code.UNAVAILABLE,
        )


def _location_digest(location: S3Location) -> str:
    return hashlib.blake2b(repr(location.identity).encode(), digest_size=16).hexdigest()


def _describe(staging: Path, uri: str, manifest: Manifest) -> None:
    description = {
        "source": uri,
        "single": manifest.single,
        "files": {file.path: file.source.size_bytes for file in manifest.files},
    }
    (staging / _DESCRIPTION).write_bytes(orjson.dumps(description))
