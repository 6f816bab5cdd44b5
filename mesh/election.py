"""Elects one leader among the routers: whoever holds the key ``leader`` under a living lease.

Level-triggered: at each change of the key, and now and then without one, it compares what stands
there with what should and acts. ``is_leader`` is also a matter of time: a leader that has not
renewed its lease for its length is none any more, whatever it last read. Still two may believe for
a moment that they lead (a paused process): what a leader writes is compare-and-swap.

Closing revokes the lease, so that another takes over at once. While the store is away nobody new
leads; nothing here fails for that.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Final

from mesh.registry import LEADER_KEY
from mesh.store.api import (
    Changes,
    Delete,
    KeyAbsent,
    KVStore,
    Lease,
    LeaseNotFound,
    Put,
    StoreDenied,
    StoreUnavailable,
)

logger = logging.getLogger(__name__)

DEFAULT_TTL_MS: Final = 10_000
# Looks again so often in a lease's length when nothing changes: after a failed call, mostly.
_LOOKS_IN_TTL: Final = 6


class Election:
    """One candidate. Run ``run()`` as a task; ``close()`` after that task was cancelled or not."""

    def __init__(
        self,
        store: KVStore,
        candidate_id: str,
        *,
        ttl_ms: int = DEFAULT_TTL_MS,
        on_change: Callable[[bool], None] | None = None,
    ) -> None:
        self._store = store
        self._candidate_id = candidate_id
        self._ttl_ms = ttl_ms
        self._on_change = on_change
        self._told = False  # what on_change was last called with
        self._lease: Lease | None = None
        self._holder: tuple[str, int] | None = None  # id and lease in the store
        self._known = False  # the key has been read
        self._seen_revision = 0  # what ``_holder`` is as of, at least
        self._moved = asyncio.Event()
        self._running: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def is_leader(self) -> bool:
        """Ask before each act."""
        lease = self._lease
        if lease is None or self._closed:
            return False
        return self._holder == (self._candidate_id, lease.lease_id) and lease.remaining_ms > 0

    @property
    def leader_id(self) -> str:
        """Who leads as far as is known here; "" for nobody."""
        return self._holder[0] if self._holder is not None else ""

    async def run(self) -> None:
        """Until the store or this is closed."""
        self._running = asyncio.current_task()
        following = asyncio.create_task(self._follow(), name="election-watch")
        try:
            while not (self._closed or following.done()):
                self._moved.clear()
                try:
                    await self._reconcile()
                except (StoreUnavailable, StoreDenied, LeaseNotFound) as error:
                    logger.debug("election: %s", error)
                self._tell()
                await self._wait_moved()
            if following.done() and not following.cancelled():
                following.result()
        finally:
            following.cancel()
            self._tell()

    async def _follow(self) -> None:
        async for step in self._store.watch(LEADER_KEY):
            self._known = True
            if isinstance(step, Changes):
                self._take(step)
            else:
                # A snapshot may go back behind our own put only where the store itself did.
                held = [item for item in step.items if item.key == LEADER_KEY]
                self._holder = (_text(held[0].value), held[0].lease_id) if held else None
                self._seen_revision = step.revision
            self._moved.set()
        self._moved.set()

    def _take(self, changes: Changes) -> None:
        for event in changes.events:
            if event.key != LEADER_KEY or event.mod_revision <= self._seen_revision:
                continue
            self._seen_revision = event.mod_revision
            match event:
                case Put():
                    self._holder = (_text(event.value), event.lease_id)
                case Delete():
                    self._holder = None

    async def _reconcile(self) -> None:
        """Take the key when nobody has it."""
        lease = self._lease
        if lease is not None and lease.lost:
            logger.warning("election: the lease of %s is lost", self._candidate_id)
            self._lease = lease = None
        if not self._known or self._holder is not None:
            return
        if lease is None:
            self._lease = lease = await self._store.lease(self._ttl_ms)
        put = Put(LEADER_KEY, self._candidate_id.encode(), lease.lease_id)
        try:
            result = await self._store.txn([KeyAbsent(LEADER_KEY)], [put])
        except LeaseNotFound:
            self._lease = None
            raise
        if result.succeeded:
            # The watch tells the same a moment later; without waiting for it nothing is lost.
            self._holder = (self._candidate_id, lease.lease_id)
            self._seen_revision = result.revision

    async def _wait_moved(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._ttl_ms / 1_000 / _LOOKS_IN_TTL):
                await self._moved.wait()

    def _tell(self) -> None:
        leads = self.is_leader
        if leads == self._told:
            return
        self._told = leads
        logger.info("%s %s", self._candidate_id, "leads" if leads else "leads no more")
        if self._on_change is not None:
            self._on_change(leads)

    async def close(self) -> None:
        """Resign. The key goes with the lease; without the store it goes when its time is over."""
        if self._closed:
            return
        self._closed = True
        self._moved.set()
        self._tell()
        running = self._running
        if running is not None and running is not asyncio.current_task():
            running.cancel()
            await asyncio.wait([running])
        lease, self._lease = self._lease, None
        if lease is not None:
            with suppress(StoreUnavailable, StoreDenied):
                await lease.revoke()


def _text(value: bytes) -> str:
    return value.decode("utf-8", "replace")
