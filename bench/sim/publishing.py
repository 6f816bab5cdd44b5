"""What a simulated instance says in the store: ``mesh.instance.publisher`` on the virtual clock.

``leased`` is what ought to stand under the lease (copies by model id, the instance's own record
under ``OWN``), ``dirty`` what may differ. One batch is on its way at a time; while the store is
away it is tried again; a new lease makes everything dirty.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from bench.sim.store import Gone, Lease, LeaseGone, Write
from mesh.core.errors import MeshError, Unavailable
from mesh.core.types import CopyRecord, InstanceRecord
from mesh.instance.publisher import FLUSH_DELAY_S, RETRY_DELAY_S
from mesh.store.api import MAX_TXN_OPS

if TYPE_CHECKING:
    from bench.sim.instance import SimInstance

OWN: Final = ""
LEASE_RETRY_MS: Final = 500.0

# (revision of the claim, None), or (0, who has it: instance and revision), or the store's error
ClaimResult = tuple[int, tuple[str, int] | None] | MeshError


class Publishing:
    """One per life of an instance."""

    def __init__(self, instance: SimInstance) -> None:
        self._instance = instance
        self._world = instance.world
        self.lease: Lease | None = None
        self.leased: dict[str, CopyRecord | InstanceRecord] = {}
        self._unleased: list[Write] = []
        self._dirty: dict[str, None] = {}
        self._armed = False
        self._writing = False
        self._waiters: list[Callable[[bool], None]] = []
        self.revision = 0  # of the last write

    @property
    def settled(self) -> bool:
        return not (self._dirty or self._unleased or self._writing)

    # ---- what ought to stand there ----------------------------------------------------------

    def put_own(self, record: InstanceRecord) -> None:
        self.leased[OWN] = record
        self._touch(OWN)

    def put_copy(self, record: CopyRecord) -> None:
        self.leased[record.model_id] = record
        self._touch(record.model_id)

    def remove_copy(self, model_id: str) -> None:
        if self.leased.pop(model_id, None) is not None:
            self._touch(model_id)

    def put(self, record: Write) -> None:
        """Without a lease."""
        self._unleased.append(record)
        self._arm()

    def _touch(self, key: str) -> None:
        self._dirty.pop(key, None)
        self._dirty[key] = None
        self._arm()

    def _arm(self, delay_ms: float = FLUSH_DELAY_S * 1_000) -> None:
        if not self._armed:
            self._armed = True
            self._instance.after(delay_ms, self._flush)

    # ---- writing ----------------------------------------------------------------------------

    def flush_then(self, told: Callable[[bool], None]) -> None:
        """Write now; ``told`` hears whether the store has taken it."""
        self._waiters.append(told)
        self._flush()

    def _flush(self) -> None:
        self._armed = False
        if self._writing:
            return  # ``_written`` goes on with what is dirty by then
        keys: list[str] = []
        writes: list[Write] = []
        lease = self.lease if self.lease is not None and self.lease.alive else None
        for key in list(self._dirty):
            if len(keys) >= MAX_TXN_OPS:
                break
            record = self.leased.get(key)
            if record is not None and lease is None:
                continue
            keys.append(key)
            writes.append(record if record is not None else self._gone(key))
            del self._dirty[key]
        unleased, self._unleased = self._unleased[:MAX_TXN_OPS], self._unleased[MAX_TXN_OPS:]
        if not writes and not unleased:
            self._tell(not self._dirty)
            return
        self._writing = True
        settings = self._world.settings
        self._world.engine.after(settings.store_ms, self._at_store, keys, writes, unleased, lease)

    def _gone(self, key: str) -> Gone:
        me = self._instance.instance_id
        return Gone(InstanceRecord, me) if key == OWN else Gone(CopyRecord, key, me)

    def _at_store(
        self, keys: list[str], writes: list[Write], unleased: list[Write], lease: Lease | None
    ) -> None:
        """The transaction arrives; its sender may be gone by now."""
        error: MeshError | None = None
        try:
            self.revision = self._world.store.write([*writes, *unleased], lease)
        except Unavailable as refused:
            error = refused
        self._instance.after(
            self._world.settings.store_ms, self._written, keys, unleased, error, lease
        )

    def _written(
        self, keys: list[str], unleased: list[Write], error: MeshError | None, lease: Lease | None
    ) -> None:
        self._writing = False
        if error is None:
            if self._dirty or self._unleased:
                self._flush()
            else:
                self._tell(True)
            return
        later, self._dirty = self._dirty, dict.fromkeys(keys)
        self._dirty.update(later)
        self._unleased[:0] = unleased
        if isinstance(error, LeaseGone):
            self.renew(lease)
        self._tell(False)
        self._armed = False
        self._arm(RETRY_DELAY_S * 1_000)

    def _tell(self, written: bool) -> None:
        waiters, self._waiters = self._waiters, []
        for told in waiters:
            told(written)

    # ---- lease ------------------------------------------------------------------------------

    def renew(self, lost: Lease | None = None) -> None:
        """A lease, a new one when ``lost`` is what is held; everything is written under it."""
        if lost is not self.lease:
            return
        try:
            self.lease = self._world.store.lease(self._instance.instance_id)
        except Unavailable:
            self._instance.after(LEASE_RETRY_MS, self.renew, lost)
            return
        for key in self.leased:
            self._touch(key)

    # ---- claim ------------------------------------------------------------------------------

    def claim(self, record: CopyRecord, revision: int, done: Callable[[ClaimResult], None]) -> None:
        if record.model_id in self._dirty:
            self.flush_then(lambda written: self._claim(record, revision, done, written))
        else:
            self._claim(record, revision, done, True)

    def _claim(
        self,
        record: CopyRecord,
        revision: int,
        done: Callable[[ClaimResult], None],
        flushed: bool,
    ) -> None:
        lease = self.lease
        if not flushed or lease is None or not lease.alive:
            done(Unavailable("this instance has no lease at the moment; retry elsewhere"))
            return
        self._world.engine.after(
            self._world.settings.store_ms, self._claim_at_store, record, revision, lease, done
        )

    def _claim_at_store(
        self,
        record: CopyRecord,
        revision: int,
        lease: Lease,
        done: Callable[[ClaimResult], None],
    ) -> None:
        result: ClaimResult
        try:
            result = self._world.store.claim(record, revision, lease)
        except MeshError as error:
            result = error
        self._instance.after(self._world.settings.store_ms, self._claimed, record, result, done)

    def _claimed(
        self, record: CopyRecord, result: ClaimResult, done: Callable[[ClaimResult], None]
    ) -> None:
        if isinstance(result, tuple) and result[1] is None:
            self.leased[record.model_id] = record
        elif isinstance(result, LeaseGone):
            self.renew(self.lease)
        elif isinstance(result, Unavailable):
            self._touch(record.model_id)
        done(result)
