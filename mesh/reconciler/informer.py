"""Keeps all objects of one resource here, as the API server has them: list once, then watch.

``run`` never gives up: a watch that ends or breaks resumes where it was, without listing again; a
version that the server no longer has (Expired) means a fresh list, which tells what came, changed
and went meanwhile. While the server is away, or says no, the store stays as it was, ``error`` says
why, and it is tried again after a backoff. Callbacks tell keys, never contents: level-triggered.

An idle watch is a silent connection without a timer of ours. What it does not notice by itself is
a server whose etcd was put back to an earlier day: there, versions that were seen are still to
come, and a watch from them is silent. Hence the look at the present version after an outage.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import aclosing
from typing import Final, Protocol

from mesh.reconciler.kube import (
    ApiAway,
    ApiError,
    ApiExpired,
    ApiForbidden,
    ApiNotFound,
    Key,
    Kube,
    Listing,
    Obj,
    Resource,
    WatchEvent,
    key_of,
)
from mesh.reconciler.work_queue import backoff_ms

logger = logging.getLogger(__name__)

_BASE_MS: Final = 200
# client-go waits up to 30 s. One watch per kind and namespace is a light load on a server that
# came back, and people look at it then.
_LONGEST_MS: Final = 8_000
# A kind that the server does not have may come with its CRD or an upgrade.
_ABSENT_S: Final = 30.0
# A watch that the server ends sooner and empty is a failure, or it would be a loop without a pause.
_SHORTEST_WATCH_S: Final = 1.0


class OnChange(Protocol):
    """Called after the store has changed: that object came, changed or went. Must not block."""

    def __call__(self, resource: Resource, namespace: str, name: str, /) -> None: ...


class Informer:
    """Run ``run()`` as a task. ``store`` is for reading only, its objects too (share, don't edit).

    ``keep`` reduces each object before it is kept; ``metadata.managedFields`` go in any case.
    """

    def __init__(
        self,
        kube: Kube,
        resource: Resource,
        namespace: str | None = None,
        *,
        on_change: OnChange | None = None,
        label_selector: str = "",
        field_selector: str = "",
        keep: Callable[[Obj], Obj] | None = None,
        on_back: Callable[[], None] | None = None,
    ) -> None:
        """``on_back`` is called once it is in step again after an error."""
        self.resource = resource
        self.namespace = namespace
        self.store: dict[Key, Obj] = {}
        self.error: ApiError | None = None  # why it is behind, until it no longer is
        self.lists_total = 0
        self.watches_total = 0
        self._kube = kube
        self._on_change = on_change
        self._on_back = on_back
        self._label_selector = label_selector
        self._field_selector = field_selector
        self._keep = keep
        self._version: str | None = None  # what ``store`` is as of; None: list first
        self._synced = asyncio.Event()
        self._settled = asyncio.Event()
        self._failures = 0  # in a row
        self._opened_s: float | None = None  # the present watch, by the loop's clock

    @property
    def synced(self) -> bool:
        """The store has been complete once; what is missing in it does not exist."""
        return self._synced.is_set()

    async def wait_synced(self) -> None:
        await self._synced.wait()

    @property
    def absent(self) -> bool:
        """The server has no such kind (an older version, a CRD that is not installed)."""
        return not self.synced and isinstance(self.error, ApiNotFound)

    @property
    def known(self) -> bool:
        """What is missing in the store does not exist, be it that the kind does not."""
        return self.synced or self.absent

    async def wait_settled(self) -> None:
        """Until it is synced, or the server has refused: then others may go on without it."""
        await self._settled.wait()

    def get(self, namespace: str, name: str) -> Obj | None:
        return self.store.get((namespace, name))

    def learn(self, obj: Obj) -> None:
        """What a write has returned, so that the next look is not at what was there before it. Its
        event comes as well, and is no news then. What is not here (any more) stays away: its
        DELETED may have overtaken the answer, and no other would come."""
        key = key_of(obj)
        known = self.store.get(key)
        if known is not None and _is_newer(obj, known):
            self.store[key] = self._reduce(obj)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            asked_s = 0.0
            try:
                await self._check_version()
                if self._version is None:
                    await self._list()
                await self._watch()
            except ApiError as error:
                if isinstance(error, ApiExpired):
                    self._version = None
                if isinstance(error, ApiAway):
                    asked_s = error.retry_after_s
                self._failures += 1
                self._note(error)
                if isinstance(error, ApiForbidden | ApiNotFound):
                    self._settled.set()
            if self.absent:
                await asyncio.sleep(_ABSENT_S)
            elif self._failures:
                delay_ms = backoff_ms(self._failures, random.random(), _BASE_MS, _LONGEST_MS)
                await asyncio.sleep(max(delay_ms / 1_000, asked_s))

    async def _check_version(self) -> None:
        """After an outage: is the server still past what was seen of it?"""
        if self._version is None or not isinstance(self.error, ApiAway):
            return
        now = await self._kube.newest_version(self.resource, self.namespace)
        if now.isdigit() and self._version.isdigit() and int(now) < int(self._version):
            logger.warning(
                "%s: the API server went back from version %s to %s: listing again",
                self.resource, self._version, now,
            )  # fmt: skip
            self._version = None

    async def _list(self) -> None:
        listing = await self._kube.list(
            self.resource,
            self.namespace,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
            keep=self._reduce,
        )
        self.lists_total += 1
        changed = self._take_all(listing)
        self._synced.set()
        self._settled.set()
        for key in changed:
            self._tell(key)

    async def _watch(self) -> None:
        assert self._version is not None
        self._opened_s = None
        events = self._kube.watch(
            self.resource,
            self.namespace,
            resource_version=self._version,
            label_selector=self._label_selector,
            field_selector=self._field_selector,
            on_open=self._opened,
        )
        async with aclosing(events):
            try:
                async for event in events:
                    self._failures = 0
                    self._take(event)
            finally:
                if self._lasted():
                    self._failures = 0
        if not self._lasted():
            self._failures += 1

    def _lasted(self) -> bool:
        now_s = asyncio.get_running_loop().time()
        return self._opened_s is not None and now_s - self._opened_s >= _SHORTEST_WATCH_S

    def _opened(self) -> None:
        self._opened_s = asyncio.get_running_loop().time()
        self.watches_total += 1
        if self.error is not None:
            logger.info("%s: in step with the API server again", self.resource)
        was, self.error = self.error, None
        if was is not None and self._on_back is not None:
            self._on_back()

    def _take_all(self, listing: Listing) -> list[Key]:
        fresh = {key_of(obj): obj for obj in listing.items}
        gone = [key for key in self.store if key not in fresh]
        changed = [
            key for key, obj in fresh.items() if _version(self.store.get(key)) != _version(obj)
        ]
        for key in gone:
            del self.store[key]
        for key in changed:
            self.store[key] = fresh[key]
        self._version = listing.resource_version
        return gone + changed

    def _take(self, event: WatchEvent) -> None:
        self._version = event.resource_version
        if event.type == "BOOKMARK":
            return
        key = key_of(event.object)
        if event.type == "DELETED":
            self.store.pop(key, None)
        elif _is_newer(event.object, self.store.get(key)):
            self.store[key] = self._reduce(event.object)
        else:
            return  # of a write of our own that was learnt of
        self._tell(key)

    def _reduce(self, obj: Obj) -> Obj:
        # Often more than the rest of the object; a PUT without it leaves the server's as it is.
        obj["metadata"].pop("managedFields", None)
        return self._keep(obj) if self._keep is not None else obj

    def _tell(self, key: Key) -> None:
        if self._on_change is not None:
            self._on_change(self.resource, *key)

    def _note(self, error: ApiError) -> None:
        """Says each thing once, not at each try."""
        if not isinstance(error, ApiExpired) and str(self.error) != str(error):
            logger.warning("%s", error)
        self.error = error


def _version(obj: Obj | None) -> object:
    return None if obj is None else (obj["metadata"].get("uid"), obj["metadata"]["resourceVersion"])


def _is_newer(obj: Obj, known: Obj | None) -> bool:
    """Versions are opaque but for this: of one object, those of one etcd are numbers that grow."""
    if known is None or known["metadata"].get("uid") != obj["metadata"].get("uid"):
        return True
    new, old = obj["metadata"]["resourceVersion"], known["metadata"]["resourceVersion"]
    return not (new.isdigit() and old.isdigit()) or int(new) > int(old)
