"""What this instance says in the store: its own record, its copies, failures of loads.

Level-triggered: ``_leased`` holds what ought to stand under the lease, ``_dirty`` the keys whose
value in the store may differ. One task flushes them, in order, in batches, and tries again while
the store is away; a new lease makes everything dirty. So a lost lease, an etcd that was away and
a storm of loads need no code of their own.

A claim is a transaction of its own, because its failure is an answer. Never writes what belongs to
others; nothing per request.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from mesh import registry
from mesh.core.errors import MeshError, NotFound, Unavailable
from mesh.core.types import CopyRecord, FailureRecord
from mesh.store.api import (
    MAX_TXN_OPS,
    Delete,
    KeyExists,
    KeyValue,
    KVStore,
    Lease,
    LeaseNotFound,
    Operation,
    PrefixUnchangedSince,
    Put,
    StoreUnavailable,
)

log = logging.getLogger(__name__)

# LOADED goes to the store this long after the load: those who waited are answered first, and the
# loads of a storm share their transactions.
FLUSH_DELAY_S: Final = 0.01
RETRY_DELAY_S: Final = 0.5


@dataclass(frozen=True, slots=True)
class Claimed:
    revision: int


@dataclass(frozen=True, slots=True)
class ClaimedElsewhere:
    """``instance_id`` is "" when whoever had it has let go since: route again."""

    instance_id: str
    copy_revision: int


Claim = Claimed | ClaimedElsewhere


class Publisher:
    """One per instance. ``run`` has to run; ``use_lease`` gives it a lease to write under."""

    def __init__(
        self, store: KVStore, instance_id: str, *, flush_delay_s: float = FLUSH_DELAY_S
    ) -> None:
        self._store = store
        self._instance_id = instance_id
        self._flush_delay_s = flush_delay_s
        self._lease: Lease | None = None
        self._leased: dict[str, bytes] = {}
        self._unleased: dict[str, bytes] = {}  # puts that have not reached the store yet
        self._dirty: dict[str, None] = {}
        self._wake = asyncio.Event()
        self._flushing = asyncio.Lock()
        self.lease_gone = asyncio.Event()
        self.connected = False
        self.revision = 0  # of the last write

    # ---- what ought to stand there ----

    def put_leased(self, key: str, value: bytes) -> None:
        if self._leased.get(key) != value:
            self._leased[key] = value
            self._touch(key)

    def put(self, key: str, value: bytes) -> None:
        """Without a lease: outlives this instance."""
        self._unleased[key] = value
        self._touch(key)

    def remove(self, key: str) -> None:
        """No-op when this instance never said anything under that key."""
        if self._leased.pop(key, None) is not None:
            self._touch(key)

    def put_copy(self, record: CopyRecord) -> None:
        self.put_leased(registry.key_of(record), registry.encode(record))

    def remove_copy(self, model_id: str) -> None:
        self.remove(registry.copy_key(model_id, self._instance_id))

    def put_failure(self, record: FailureRecord) -> None:
        self.put(registry.key_of(record), registry.encode(record))

    def _touch(self, key: str) -> None:
        self._dirty.pop(key, None)  # to the end: order of changes is order of writes
        self._dirty[key] = None
        self._wake.set()

    # ---- lease ----

    @property
    def has_lease(self) -> bool:
        return self._lease is not None and not self._lease.lost

    def use_lease(self, lease: Lease) -> None:
        self._lease = lease
        self.lease_gone.clear()
        for key in self._leased:
            self._touch(key)

    # ---- claim ----

    async def claim(self, record: CopyRecord, revision: int) -> Claim:
        """Put ``record`` if nothing under its model's copies changed since ``revision``.

        Raises NotFound when the model is not registered, Unavailable without a lease or store.
        """
        key = registry.key_of(record)
        if key in self._dirty:
            await self.flush()
        lease = self._lease
        if lease is None or lease.lost:
            raise Unavailable("this instance has no lease at the moment; retry elsewhere")
        prefix = registry.copies_prefix(record.model_id)
        model_key = registry.model_key(record.model_id)
        try:
            result = await self._store.txn(
                [KeyExists(model_key), PrefixUnchangedSince(prefix, revision)],
                [Put(key, registry.encode(record), lease.lease_id)],
                read_on_failure=[prefix, model_key],
            )
        except LeaseNotFound:
            self.lease_gone.set()
            raise
        except StoreUnavailable:
            self._touch(key)  # it may have been applied: have it deleted
            raise
        if result.succeeded:
            self._leased[key] = registry.encode(record)
            if lease is not self._lease:  # exchanged meanwhile: the claim is gone with the old
                self._touch(key)
            return Claimed(result.revision)
        if not any(item.key == model_key for item in result.read):
            raise NotFound(f"model {record.model_id!r} is not registered")
        return self._holder(prefix, result.read)

    def _holder(self, prefix: str, items: tuple[KeyValue, ...]) -> ClaimedElsewhere:
        holders = [item for item in items if item.key.startswith(prefix)]
        newest = max(holders, key=lambda item: item.mod_revision, default=None)
        if newest is None:
            return ClaimedElsewhere("", 0)
        parsed = registry.parse_key(newest.key)
        return ClaimedElsewhere(parsed.instance_id if parsed else "", newest.mod_revision)

    # ---- writing ----

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._flush_delay_s)
            self._wake.clear()
            try:
                await self.flush()
            except MeshError as error:
                log.warning("the store takes no writes (%s); trying again", error)
                await asyncio.sleep(RETRY_DELAY_S)
                self._wake.set()

    async def flush(self) -> None:
        """Write everything that differs, but for leased keys while there is no lease.

        Raises StoreUnavailable or LeaseNotFound with the rest still dirty.
        """
        async with self._flushing:
            while self._dirty:
                batch = self._next_batch()
                if not batch:
                    return  # only leased keys are left, and there is no lease
                operations = [operation for _, operation, _ in batch]
                try:
                    self.revision = (await self._store.txn([], operations)).revision
                except LeaseNotFound:
                    self._back(batch)
                    self.lease_gone.set()
                    raise
                except BaseException as error:  # cancelled, too: whoever waited gave up
                    self.connected = self.connected and not isinstance(error, MeshError)
                    self._back(batch)
                    raise
                self.connected = True
                for key, _, value in batch:
                    if self._unleased.get(key) == value:
                        self._unleased.pop(key, None)

    def _next_batch(self) -> list[tuple[str, Operation, bytes | None]]:
        lease_id = self._lease.lease_id if self._lease and not self._lease.lost else 0
        batch: list[tuple[str, Operation, bytes | None]] = []
        for key in list(self._dirty):
            if len(batch) >= MAX_TXN_OPS:
                break
            if (value := self._leased.get(key)) is not None:
                if not lease_id:
                    continue  # stays dirty until there is a lease
                batch.append((key, Put(key, value, lease_id), value))
            elif (value := self._unleased.get(key)) is not None:
                batch.append((key, Put(key, value), value))
            else:
                batch.append((key, Delete(key), None))
            del self._dirty[key]
        return batch

    def _back(self, batch: list[tuple[str, Operation, bytes | None]]) -> None:
        """What was not written is dirty again, before what came later."""
        later = self._dirty
        self._dirty = {key: None for key, _, _ in batch}
        self._dirty.update(later)
        self._wake.set()
