"""What this instance says in the store: its own record, its copies, failures of loads.

Level-triggered: ``_leased`` holds what ought to stand under the lease, ``_dirty`` the keys whose
value in the store may differ. One task flushes them, in order, in batches, and tries again while
the store is away; a new lease makes everything dirty. So a lost lease, an etcd that was away and
a storm of loads need no code of their own; and ``audit`` makes dirty what an outside hand changed.

A claim is a transaction of its own, because its failure is an answer. One whose answer did not come
may have been applied: its key is dirty then, and the next flush makes it what it ought to be. Never
writes what belongs to others; nothing per request.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from typing import Final

from mesh import registry
from mesh.core.errors import MeshError, NotFound
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
# Writes wait while an audit reads.
AUDIT_TIMEOUT_S: Final = 2.0
# While the store is away that is logged this often.
_LOG_EVERY_S: Final = 10.0


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
        self._on_the_way: set[str] = set()  # keys of the transaction that has not answered yet
        self._wake = asyncio.Event()
        self._flushing = asyncio.Lock()
        self._claiming: set[str] = set()  # keys of claims whose answer has not come yet
        self._leased_anew = asyncio.Event()
        self.lease_gone = asyncio.Event()
        self.connected = False
        # The last write found no store. Something is dirty then, so that the next success is soon.
        self.away = False
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
        return self._living() is not None

    def _living(self) -> Lease | None:
        lease = self._lease
        gone = lease is None or lease.lost or self.lease_gone.is_set()
        return None if gone else lease

    def use_lease(self, lease: Lease) -> None:
        self._lease = lease
        self.lease_gone.clear()
        for key in self._leased:
            self._touch(key)
        self._leased_anew.set()

    async def wait_lease(self) -> None:
        """Return when there is one to write under."""
        while not self.has_lease:
            self._leased_anew.clear()
            await self._leased_anew.wait()

    async def audit(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """Compare what stands under the lease with what ought to; keys (missing, in excess).

        Both become dirty: the next flush writes the ones and deletes the others. Raises
        StoreUnavailable or LeaseNotFound, and TimeoutError past ``AUDIT_TIMEOUT_S``.
        """
        async with self._flushing, asyncio.timeout(AUDIT_TIMEOUT_S):  # nothing is on its way
            lease = self._living()
            if lease is None:
                return (), ()
            ought = set(self._leased) - self._dirty.keys()
            try:
                found = await lease.keys()
            except LeaseNotFound:
                self.lease_gone.set()
                raise
            if lease is not self._living():
                return (), ()
            settled = self._dirty.keys() | self._claiming
            missing = sorted((ought & self._leased.keys()) - found - settled)
            excess = sorted(found - self._leased.keys() - settled)
        for key in (*missing, *excess):
            self._touch(key)
        return tuple(missing), tuple(excess)

    # ---- claim ----

    async def claim(self, record: CopyRecord, revision: int) -> Claim:
        """Put ``record`` if nothing under its model's copies changed since ``revision``.

        What this instance left there itself (an earlier claim whose answer was lost) does not
        count. Raises NotFound when the model is not registered, LeaseNotFound without a lease and
        StoreUnavailable.
        """
        key = registry.key_of(record)
        self._claiming.add(key)
        try:
            if key in self._dirty or key in self._on_the_way:
                await self.flush()  # what is said of an earlier copy must not come after the claim
            claim = await self._claim(record, key, revision)
            if isinstance(claim, ClaimedElsewhere) and claim.instance_id == self._instance_id:
                claim = await self._claim(record, key, claim.copy_revision)
            return claim
        except StoreUnavailable:
            self._not_reached(key)
            raise
        except asyncio.CancelledError:  # whoever waited gave up
            self._touch(key)
            raise
        finally:
            self._claiming.discard(key)

    def not_answered(self) -> None:
        """A write was given up because no answer came: the store counts as away."""
        self.connected = False
        self.away = bool(self._dirty)

    def _not_reached(self, key: str) -> None:
        self._touch(key)  # it may have been applied
        self.not_answered()

    async def _claim(self, record: CopyRecord, key: str, revision: int) -> Claim:
        lease = self._living()
        if lease is None:
            raise LeaseNotFound("this instance has no lease at the moment; retry elsewhere")
        prefix = registry.copies_prefix(record.model_id)
        model_key = registry.model_key(record.model_id)
        value = registry.encode(record)
        try:
            result = await self._store.txn(
                [KeyExists(model_key), PrefixUnchangedSince(prefix, revision)],
                [Put(key, value, lease.lease_id)],
                read_on_failure=[prefix, model_key],
            )
        except LeaseNotFound:
            self.lease_gone.set()
            raise
        if result.succeeded:
            self._leased[key] = value
            if lease is not self._lease:  # exchanged meanwhile: the claim is gone with the old
                self._touch(key)
            return Claimed(result.revision)
        if not any(item.key == model_key for item in result.read):
            raise NotFound(f"model {record.model_id!r} is not registered")
        return self._holder(prefix, result.read, revision)

    def _holder(self, prefix: str, items: tuple[KeyValue, ...], revision: int) -> ClaimedElsewhere:
        """Who was first since ``revision``; ourselves only when it was nobody else."""
        own = prefix + registry.escape(self._instance_id)
        newest = max(
            (item for item in items if item.key.startswith(prefix)),
            key=lambda item: (item.mod_revision > revision, item.key != own, item.mod_revision),
            default=None,
        )
        if newest is None:
            return ClaimedElsewhere("", 0)
        parsed = registry.parse_key(newest.key)
        return ClaimedElsewhere(parsed.instance_id if parsed else "", newest.mod_revision)

    # ---- writing ----

    async def run(self) -> None:
        """Until cancelled."""
        log_at_s = 0.0
        while True:
            await self._wake.wait()
            await asyncio.sleep(self._flush_delay_s)
            self._wake.clear()
            try:
                await self.flush()
            except MeshError as error:
                now_s = asyncio.get_running_loop().time()
                if now_s >= log_at_s:
                    log_at_s = now_s + _LOG_EVERY_S
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
                self._on_the_way = {key for key, _, _ in batch}
                try:
                    self.revision = (await self._store.txn([], operations)).revision
                except LeaseNotFound:
                    self._back(batch)
                    self.lease_gone.set()
                    raise
                except BaseException as error:  # cancelled, too: whoever waited gave up
                    self._back(batch)
                    if isinstance(error, MeshError):
                        self.not_answered()
                    raise
                finally:
                    self._on_the_way = set()
                self.connected, self.away = True, False
                for key, _, value in batch:
                    if self._unleased.get(key) == value:
                        self._unleased.pop(key, None)

    def _next_batch(self) -> list[tuple[str, Operation, bytes | None]]:
        lease = self._living()
        lease_id = lease.lease_id if lease is not None else 0
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
