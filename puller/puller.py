"""Brings a model's artifact to this machine's disk: the ``ArtifactSource`` of a serving pod.

Owns who waits for which fetch and who holds which artifact. ``file://`` and ``pvc://`` are used in
place (``puller.local``), but for archives; what is remote is downloaded once into the disk cache,
whoever and however many ask for it: fetches of one location share one flight, and a waiter that is
cancelled leaves the flight to the others and to the cache.

The source is asked each time what it has, so a changed artifact is a new cache entry; when it
cannot be reached, the entry used last serves instead and the log says so. Fails with
``LoadFailed``, see ``mesh.artifacts``. An error of a caller's progress callback is logged and ends
that callback only.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from mesh.artifacts import Artifact, ArtifactRequest
from mesh.core.errors import Code, LoadFailed
from puller import local
from puller.archive import is_archive
from puller.backends import open_backend
from puller.blocking import BlockingPool
from puller.cache import DiskCache, EntryName
from puller.disk import Disk, RealDisk
from puller.location import (
    FileLocation,
    LocalArchiveLocation,
    Location,
    PvcLocation,
    RemoteLocation,
)
from puller.remote import RemoteFetcher
from puller.resolve import resolve_location
from puller.settings import PullerSettings
from puller.source import OpenSource
from puller.storage_config import read_storage_config
from puller.storage_key import StorageSecret

__all__ = ["Puller", "PullerSettings"]

logger = logging.getLogger(__name__)

Progress = Callable[[int, int | None], None]

_THREADS = 4  # file I/O and hashing; more would only fight over the disk


@dataclass(slots=True, eq=False)
class _Flight:
    """One fetch that is under way, and those who wait for it."""

    waiting: int = 0
    callbacks: list[Progress] = field(default_factory=list)
    last: tuple[int, int | None] | None = None
    task: asyncio.Task[tuple[EntryName, Artifact]] | None = None

    def report(self, done_bytes: int, total_bytes: int | None) -> None:
        self.last = (done_bytes, total_bytes)
        for callback in tuple(self.callbacks):
            self.tell(callback)

    def tell(self, callback: Progress) -> None:
        if self.last is None:
            return
        try:
            callback(*self.last)
        except Exception:
            logger.exception("a progress callback failed; it is not called again")
            if callback in self.callbacks:
                self.callbacks.remove(callback)


class Puller:
    """``mesh.artifacts.ArtifactSource``. One event loop, one instance of this per process."""

    def __init__(
        self,
        settings: PullerSettings,
        *,
        disk: Disk | None = None,
        open_source: OpenSource | None = None,
    ) -> None:
        self._settings = settings
        self._pool = BlockingPool(_THREADS)
        disk = disk or RealDisk()
        self._cache = DiskCache(settings.cache_dir, settings.cache_capacity_bytes, disk)
        self._fetcher = RemoteFetcher(
            settings, self._cache, self._pool, disk, open_source or open_backend(settings)
        )
        self._flights: dict[tuple[str, ...], _Flight] = {}
        # By identity of the Artifact that was handed out: equal ones are separate holds.
        self._held: dict[int, tuple[Artifact, EntryName]] = {}
        self._starting: asyncio.Lock = asyncio.Lock()
        self._started = False
        self._closed = False

    async def start(self) -> None:
        """Prepare the disk cache and remove what a crashed process left. ``fetch`` does it too."""
        async with self._starting:
            if not self._started:
                await self._pool.run(self._cache.start)
                self._started = True

    async def fetch(self, request: ArtifactRequest, progress: Progress | None = None) -> Artifact:
        if self._closed:
            raise LoadFailed("the artifact puller is closed", code=Code.UNAVAILABLE)
        place = await self._pool.run(self._place, request)
        if isinstance(place, Artifact):
            if progress is not None:
                progress(place.size_bytes, place.size_bytes)
            return place
        await self.start()
        return await self._join_flight(place, progress)

    async def version(self, request: ArtifactRequest) -> str:
        """Changes whenever the artifact does; "" for what is used in place. Fails as ``fetch``."""
        place = await self._pool.run(self._place, request)
        return "" if isinstance(place, Artifact) else await self._fetcher.version(place)

    def release(self, artifact: Artifact) -> None:
        held = self._held.pop(id(artifact), None)
        if held is not None:
            self._cache.release(held[1])

    async def close(self) -> None:
        """End the fetches under way (their waiters fail) and let go of everything."""
        if self._closed:
            return
        self._closed = True
        tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self._fetcher.close()
        self._held.clear()
        await self._pool.run(self._cache.close)
        self._pool.close()

    async def settle(self) -> None:
        """Wait until no fetch is under way, also those that nobody waits for any more."""
        while self._flights:
            tasks = [flight.task for flight in self._flights.values() if flight.task is not None]
            await asyncio.wait(tasks)

    def _place(self, request: ArtifactRequest) -> Artifact | RemoteLocation:
        location = self._locate(request)
        if isinstance(location, FileLocation | PvcLocation):
            return self._use_in_place(location)
        return location

    def _locate(self, request: ArtifactRequest) -> Location:
        directory = self._settings.storage_config_dir
        secret = StorageSecret(
            where="" if directory is None else str(directory),
            entries=read_storage_config(directory),
        )
        return resolve_location(
            request.path, request.key, secret=secret, store_env=self._settings.store_env
        )

    def _use_in_place(
        self, location: FileLocation | PvcLocation
    ) -> Artifact | LocalArchiveLocation:
        if isinstance(location, FileLocation):
            path, root = local.locate_file(location, self._settings.file_roots)
        else:
            path, root = local.locate_pvc(location, self._settings.pvc_root)
        if is_archive(path.name) and path.is_file():
            return LocalArchiveLocation(location.uri, str(path))
        size_bytes = local.measure(
            path, root, location.uri, max_files=self._settings.max_artifact_files
        )
        if size_bytes > self._settings.max_artifact_bytes:
            raise LoadFailed(
                f"{location.uri} has {size_bytes} bytes, more than the "
                f"{self._settings.max_artifact_bytes} that an artifact may have"
            )
        return Artifact(path=path, size_bytes=size_bytes, source=location.uri, cached=True)

    async def _join_flight(self, location: RemoteLocation, progress: Progress | None) -> Artifact:
        flight = self._flights.get(location.identity)
        if flight is None:
            flight = _Flight()
            self._flights[location.identity] = flight
            flight.task = asyncio.create_task(self._fly(location, flight))
        task = flight.task
        assert task is not None
        flight.waiting += 1
        if progress is not None:
            flight.callbacks.append(progress)
            flight.tell(progress)
        try:
            await asyncio.wait([task])
            if task.cancelled():
                raise LoadFailed("the artifact puller was closed", code=Code.UNAVAILABLE)
            error = task.exception()
            if isinstance(error, LoadFailed):  # an error of its own for each who waits
                raise LoadFailed(error.message, code=error.code) from error
            return self._hand_out(*task.result())
        finally:
            flight.waiting -= 1
            if progress is not None and progress in flight.callbacks:
                flight.callbacks.remove(progress)
            if flight.waiting == 0 and task.done():
                self._end_hold_of(task)

    async def _fly(self, location: RemoteLocation, flight: _Flight) -> tuple[EntryName, Artifact]:
        """The fetch itself. Its result is held once for the flight, until the last waiter went."""
        try:
            return await self._fetcher.fetch(location, flight.report)
        finally:
            del self._flights[location.identity]
            if flight.waiting == 0 and flight.task is not None:
                flight.task.add_done_callback(self._end_hold_of)

    def _hand_out(self, name: EntryName, artifact: Artifact) -> Artifact:
        own = Artifact(artifact.path, artifact.size_bytes, artifact.source, artifact.cached)
        self._cache.hold_again(name)
        self._held[id(own)] = (own, name)
        return own

    def _end_hold_of(self, task: asyncio.Task[tuple[EntryName, Artifact]]) -> None:
        if not task.cancelled() and task.exception() is None:
            self._cache.release(task.result()[0])
