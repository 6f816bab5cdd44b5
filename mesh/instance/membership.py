"""This instance as a member of the mesh: its lease, its record, its last uses, deleted models.

A lost lease is replaced and everything is published anew under it; meanwhile, and while the store
is away, the instance goes on serving what it has. Model records are watched by their prefix: for
deletions and changed pins of the copies that are here; everything else is dropped unread. That
costs each instance one event for a registration or a measured size; a watch of deletions alone
would need a filter in ``KVStore.watch`` (etcd has NOPUT).

Every ``Policy.audit_ms`` what stands under the lease is compared with what ought to: an instance
without a record, or a copy without one, comes back by itself, and nothing is left standing.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine
from typing import Any, Final

from mesh import registry
from mesh.core.errors import MeshError
from mesh.core.types import InstanceRecord
from mesh.instance.advert import notable
from mesh.instance.clock import Clock
from mesh.instance.pod import Pod
from mesh.instance.publisher import Publisher
from mesh.store.api import Changes, Delete, KeyValue, KVStore, Lease, Put, Snapshot

log = logging.getLogger(__name__)

LEASE_RETRY_S: Final = 0.5
TICK_S: Final = 0.5
# Not oftener, whatever the policy says: an audit reads all keys of a lease.
AUDIT_MIN_S: Final = 1.0


class Membership:
    """``describe_self`` makes the present record. ``run`` never returns by itself."""

    def __init__(
        self,
        pod: Pod,
        store: KVStore,
        publisher: Publisher,
        clock: Clock,
        describe_self: Callable[[], InstanceRecord],
    ) -> None:
        self._pod = pod
        self._store = store
        self._publisher = publisher
        self._clock = clock
        self._describe_self = describe_self
        self._lease: Lease | None = None
        self._last: InstanceRecord | None = None
        self._last_at_ms = 0
        self._flushed_at_ms = clock.now_ms()
        self.joined = asyncio.Event()  # the record has been written once

    async def run(self, *beside: Coroutine[Any, Any, None]) -> None:
        """``beside``: what has to run as long; its failure is the instance's."""
        async with asyncio.TaskGroup() as group:
            for work in beside:
                group.create_task(work)
            group.create_task(self._publisher.run())
            group.create_task(self._hold_lease())
            group.create_task(self._advertise())
            group.create_task(self._follow_models())
            group.create_task(self._audits())

    # ---- lease ----

    async def _hold_lease(self) -> None:
        while True:
            try:
                lease = await self._store.lease(self._pod.policy.instance_lease_ttl_ms)
            except MeshError as error:
                log.warning("no lease to be had (%s); serving on, trying again", error)
                await asyncio.sleep(LEASE_RETRY_S)
                continue
            self._lease = lease
            self._publisher.use_lease(lease)
            await self._until_lost(lease)
            log.warning("lease %x is lost; publishing everything under a new one", lease.lease_id)

    async def _until_lost(self, lease: Lease) -> None:
        waits = [
            asyncio.create_task(lease.wait_lost()),
            asyncio.create_task(self._publisher.lease_gone.wait()),
        ]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()

    async def leave(self) -> None:
        """Take the record and the copies away at once instead of letting the lease run out."""
        lease, self._lease = self._lease, None
        try:
            self.flush_last_used()
        except Exception:
            log.exception("last uses are not told: a defect; the lease is given back all the same")
        with contextlib.suppress(MeshError):
            await self._publisher.flush()
        if lease is not None:
            with contextlib.suppress(MeshError):
                await lease.revoke()

    # ---- record and last uses ----

    async def _advertise(self) -> None:
        while True:
            try:
                await self._upkeep()
            except Exception:  # its copies serve: what goes wrong here must not take them along
                log.exception("upkeep: a defect; going on")
            if not self.joined.is_set() and self._publisher.connected:
                self.joined.set()
            await asyncio.sleep(TICK_S if self.joined.is_set() else 0.02)

    async def _upkeep(self) -> None:
        self.advertise()
        self._pod.tick()
        if self._pod.claims.unconfirmed and self._publisher.connected:
            await self._pod.confirm()
        now_ms = self._clock.now_ms()
        if now_ms - self._flushed_at_ms >= self._pod.policy.last_used_flush_ms:
            self.flush_last_used()

    def advertise(self) -> None:
        """Publish the record if something notable has changed."""
        record, now_ms = self._describe_self(), self._clock.now_ms()
        reason = notable(self._last, record, now_ms - self._last_at_ms, self._pod.policy)
        if reason is not None:
            log.debug("advertising: %s", reason)
            self._last, self._last_at_ms = record, now_ms
            self._publisher.put_leased(registry.key_of(record), registry.encode(record))

    def flush_last_used(self) -> None:
        self._flushed_at_ms = self._clock.now_ms()
        pod = self._pod
        uses, scores = pod.use_book.flush(pod.copies(), pod.policy.use_half_life_ms)
        if uses:
            self._publisher.put(
                registry.last_used_key(pod.instance_id), registry.encode_last_used(uses, scores)
            )

    # ---- audit ----

    async def _audits(self) -> None:
        while True:
            await asyncio.sleep(max(AUDIT_MIN_S, self._pod.policy.audit_ms / 1_000))
            await self.audit()

    async def audit(self) -> None:
        """One comparison; what is found is mended by the publisher."""
        if self._publisher.away:
            return
        try:
            missing, excess = await self._publisher.audit()
        except (MeshError, TimeoutError) as error:
            log.info("nothing is compared with the store now: %s", error or "no answer in time")
            return
        for reason, keys in (("missing_in_store", missing), ("excess_in_store", excess)):
            for key in keys:
                self._pod.note_repair(reason, key)

    # ---- models ----

    async def _follow_models(self) -> None:
        async for batch in self._store.watch(registry.MODELS_PREFIX):
            match batch:
                case Snapshot(items, revision):
                    self._models_snapshot(items, revision)
                case Changes(events):
                    for event in events:
                        self._model_event(event)

    def _models_snapshot(self, items: tuple[KeyValue, ...], revision: int) -> None:
        """Of a hundred thousand models, those that are here."""
        keys = {registry.model_key(model_id): model_id for model_id in self._pod.concerning()}
        for item in items:
            model_id = keys.pop(item.key, None)
            if model_id is not None:
                self._told(model_id, item.value, item.mod_revision)
        for model_id in keys.values():
            self._pod.told(model_id, None, revision)

    def _model_event(self, event: Put | Delete) -> None:
        parsed = registry.parse_key(event.key)
        if parsed is None or not self._pod.concerns(parsed.name):
            return
        if isinstance(event, Delete):
            self._pod.told(parsed.name, None, event.mod_revision)
        else:
            self._told(parsed.name, event.value, event.mod_revision)

    def _told(self, model_id: str, value: bytes, revision: int) -> None:
        try:
            self._pod.told(model_id, registry.decode_model(model_id, value), revision)
        except MeshError as error:
            log.warning("model record skipped: %s", error)
