"""The port between the fetch and a remote store, and how a read that failed is tried again.

A back end (``puller.object_store``, ``puller.http``) turns everything that its library throws into
one of three: ``TransientSourceError`` (may heal: try again), ``ObjectChangedError`` (begin anew
with a fresh manifest), and ``LoadFailed`` (will not heal; carries the message for the user).
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol, TypeVar

from mesh.core.errors import Code, LoadFailed
from puller.disk import Chunk
from puller.location import RemoteLocation
from puller.manifest import Manifest, RemoteObject
from puller.settings import PullerSettings

T = TypeVar("T")


class TransientSourceError(Exception):
    """The store could not be reached, was overloaded, or dropped the connection."""


class ObjectChangedError(Exception):
    """The object is no longer the one in the manifest."""


class RemoteSource(Protocol):
    async def manifest(self) -> Manifest: ...

    def read(self, source: RemoteObject, start: int, end: int | None) -> AsyncIterator[Chunk]:
        """Bytes ``start`` to ``end`` (None: as many as there are) of exactly this version of the
        object, in pieces of some size."""
        ...

    async def close(self) -> None:
        """Nothing more is read."""
        ...


OpenSource = Callable[[RemoteLocation], RemoteSource]  # may block


class Backoff:
    """Counts failures without progress; waits longer after each, and gives up after the last."""

    def __init__(self, settings: PullerSettings, uri: str) -> None:
        self._settings = settings
        self._uri = uri
        self._failures = 0

    def progressed(self) -> None:
        self._failures = 0

    async def failed(self, error: TransientSourceError) -> None:
        self._failures += 1
        if self._failures >= self._settings.attempts_max:
            raise LoadFailed(
                f"{self._uri} cannot be read: {error} (tried {self._failures} times)",
                code=Code.UNAVAILABLE,
            ) from error
        longest_ms = self._settings.backoff_base_ms * 2 ** (self._failures - 1)
        # Half of it is drawn: pods that lost the same store do not come back in step.
        delay_ms = min(longest_ms, self._settings.backoff_max_ms) * random.uniform(0.5, 1.0)
        await asyncio.sleep(delay_ms / 1000)


async def retried(call: Callable[[], Awaitable[T]], backoff: Backoff) -> T:
    """``call`` until it works or will not heal; bounded by the back-off."""
    while True:
        try:
            return await call()
        except TransientSourceError as error:
            await backoff.failed(error)
