"""etcd as the mesh sees it, without keys and bytes: records, revisions, leases, watches, claims.

It keeps what stands there (``models``, ``instances``, ``copies``, ``failures``, ``last_used``) and
hands each change to every watcher, in order, some milliseconds later and as a batch, as etcd does.
A call here is the instant at which the store applies it; how long the way takes is the caller's.

A claim succeeds when no copy of its model that stands there now is newer than the revision that it
names (``PrefixUnchangedSince``). A paused store raises ``Unavailable`` from everything, delivers
nothing and lets no lease expire; afterwards every lease has its whole time again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from bench.sim.engine import Engine
from mesh.core.errors import NotFound, Unavailable
from mesh.core.types import CopyRecord, FailureRecord, InstanceRecord, ModelRecord
from mesh.core.view import ClusterView

# Events behind which the log is cut once every watcher has had them.
_LOG_SLACK: Final = 4_096


@dataclass(frozen=True, slots=True)
class LastUsed:
    """``lastused/<instance_id>``."""

    instance_id: str
    at_ms: Mapping[str, int]
    scores: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Gone:
    """A key was deleted. ``family`` is the record's type."""

    family: type
    name: str
    instance_id: str = ""


Record = ModelRecord | InstanceRecord | CopyRecord | FailureRecord | LastUsed
Write = Record | Gone


class LeaseGone(Unavailable):
    """The lease that a write was to stand under has expired."""


class Lease:
    """Alive until ``ends_at`` unless it is kept alive; ``inf`` while its holder does so."""

    __slots__ = ("alive", "ends_at", "holder")

    def __init__(self, holder: str) -> None:
        self.holder = holder
        self.alive = True
        self.ends_at = float("inf")


class Watch:
    """One watcher of everything. One batch is on its way at a time."""

    __slots__ = ("_armed", "_consume", "_store", "closed", "delay_ms", "position")

    def __init__(
        self, store: SimStore, delay_ms: float, consume: Callable[[Sequence[Change]], None]
    ) -> None:
        self._store = store
        self.delay_ms = delay_ms
        self._consume = consume
        self._armed = False
        self.closed = False
        self.position = store.log_end

    def arm(self) -> None:
        if not self._armed and not self.closed and self.position < self._store.log_end:
            self._armed = True
            self._store.engine.after(self.delay_ms, self._deliver, self._store.log_end)

    def _deliver(self, upto: int) -> None:
        self._armed = False
        if self.closed or self._store.paused:
            return  # ``resume`` arms it again
        changes = self._store.changes(self.position, upto)
        self.position = upto
        self._consume(changes)
        self.arm()


Change = tuple[int, Write]


class SimStore:
    """See the module's docstring."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.paused = False
        self.revision = 1
        self.writes_total = 0
        self.models: dict[str, ModelRecord] = {}
        self.instances: dict[str, InstanceRecord] = {}
        self.copies: dict[str, dict[str, tuple[CopyRecord, int]]] = {}
        self.failures: dict[tuple[str, str], FailureRecord] = {}
        self.last_used: dict[str, LastUsed] = {}
        self._leases: dict[str, Lease] = {}  # by holder: one each
        self._watches: list[Watch] = []
        self._log: list[Change] = []
        self._log_start = 0

    # ---- writing ----------------------------------------------------------------------------

    def write(self, writes: Iterable[Write], lease: Lease | None = None) -> int:
        """One transaction without conditions; ``lease`` is what instances and copies stand under.
        Returns the revision."""
        self._check(lease)
        return self._apply(writes)

    def claim(
        self, record: CopyRecord, revision: int, lease: Lease
    ) -> tuple[int, tuple[str, int] | None]:
        """(revision, None) when the claim stands; else (0, (its holder, that one's revision))."""
        self._check(lease)
        if record.model_id not in self.models:
            raise NotFound(f"model {record.model_id!r} is not registered")
        there = self.copies.get(record.model_id, {})
        newest = max(there.items(), key=lambda item: item[1][1], default=None)
        if newest is not None and newest[1][1] > revision:
            return 0, (newest[0], newest[1][1])
        return self._apply((record,)), None

    def _check(self, lease: Lease | None) -> None:
        if self.paused:
            raise Unavailable("the store does not answer")
        if lease is not None and not lease.alive:
            raise LeaseGone("the lease has expired")

    def _apply(self, writes: Iterable[Write]) -> int:
        self.revision += 1
        self.writes_total += 1
        for write in writes:
            self._put(write)
            self._log.append((self.revision, write))
        for watch in self._watches:
            watch.arm()
        return self.revision

    def _put(self, write: Write) -> None:
        match write:
            case CopyRecord(model_id=model_id, instance_id=instance_id):
                self.copies.setdefault(model_id, {})[instance_id] = (write, self.revision)
            case InstanceRecord():
                self.instances[write.instance_id] = write
            case ModelRecord():
                self.models[write.model_id] = write
            case FailureRecord():
                self.failures[(write.model_id, write.instance_id)] = write
            case LastUsed():
                self.last_used[write.instance_id] = write
            case Gone():
                self._delete(write)
            case _:
                assert_never(write)

    def _delete(self, gone: Gone) -> None:
        if gone.family is CopyRecord:
            there = self.copies.get(gone.name, {})
            there.pop(gone.instance_id, None)
            if not there:
                self.copies.pop(gone.name, None)
        elif gone.family is InstanceRecord:
            self.instances.pop(gone.name, None)
        elif gone.family is ModelRecord:
            self.models.pop(gone.name, None)
        elif gone.family is FailureRecord:
            self.failures.pop((gone.name, gone.instance_id), None)
        else:
            self.last_used.pop(gone.name, None)

    # ---- leases -----------------------------------------------------------------------------

    def lease(self, holder: str) -> Lease:
        """A new lease, kept alive until ``not_kept_alive``."""
        self._check(None)
        lease = self._leases[holder] = Lease(holder)
        return lease

    def not_kept_alive(self, lease: Lease, left_ms: float, ttl_ms: float) -> None:
        """Its holder does not answer from now on; the store knew of it for ``left_ms`` more."""
        lease.ends_at = self.engine.time + left_ms
        self.engine.after(left_ms, self._maybe_expire, lease, ttl_ms)

    def kept_alive(self, lease: Lease) -> bool:
        """Its holder is back; whether that was in time."""
        if lease.alive:
            lease.ends_at = float("inf")
        return lease.alive

    def _maybe_expire(self, lease: Lease, ttl_ms: float) -> None:
        if not lease.alive or self.engine.time < lease.ends_at:
            return
        if self.paused:  # nothing expires while the store is away, and all begin anew after it
            lease.ends_at = self.engine.time + ttl_ms
            self.engine.after(ttl_ms, self._maybe_expire, lease, ttl_ms)
            return
        self.revoke(lease)

    def revoke(self, lease: Lease) -> None:
        """All that stands under it goes in one transaction."""
        if not lease.alive:
            return
        lease.alive = False
        holder = lease.holder
        keys: list[Write] = [
            Gone(CopyRecord, model_id, holder)
            for model_id, there in self.copies.items()
            if holder in there
        ]
        if holder in self.instances:
            keys.append(Gone(InstanceRecord, holder))
        self._apply(keys)

    # ---- pauses -----------------------------------------------------------------------------

    def pause(self) -> None:
        self.paused = True

    def resume(self) -> None:
        self.paused = False
        for watch in self._watches:
            watch.arm()

    # ---- watching ---------------------------------------------------------------------------

    @property
    def log_end(self) -> int:
        return self._log_start + len(self._log)

    def changes(self, start: int, end: int) -> Sequence[Change]:
        found = self._log[start - self._log_start : end - self._log_start]
        if len(self._log) > 2 * _LOG_SLACK:
            oldest = min((w.position for w in self._watches if not w.closed), default=end)
            cut = min(oldest, start) - self._log_start
            if cut > _LOG_SLACK:
                del self._log[:cut]
                self._log_start += cut
        return found

    def watch(self, delay_ms: float, consume: Callable[[Sequence[Change]], None]) -> Watch:
        """From now on; whoever begins takes a snapshot (``fill``) first."""
        watch = Watch(self, delay_ms, consume)
        self._watches.append(watch)
        return watch

    def close_watch(self, watch: Watch) -> None:
        watch.closed = True
        self._watches.remove(watch)

    def fill(self, view: ClusterView) -> None:
        """A snapshot of everything."""
        view.replace_models(self.models.values())
        view.replace_vmodels(())
        view.replace_instances(self.instances.values())
        view.replace_copies(
            (record for there in self.copies.values() for record, _ in there.values()),
            self.revision,
        )
        view.replace_failures(self.failures.values())
        view.replace_last_used({b.instance_id: b.at_ms for b in self.last_used.values()})
        for blob in self.last_used.values():
            view.put_use_scores(blob.scores)
        view.advance(self.revision)


def take_in(view: ClusterView, changes: Sequence[Change]) -> set[str]:
    """What ``mesh.view_sync`` does with a batch of changes; the models that it touched."""
    touched: set[str] = set()
    for revision, write in changes:
        match write:
            case CopyRecord():
                view.put_copy(write, revision)
                touched.add(write.model_id)
            case InstanceRecord():
                view.put_instance(write)
            case ModelRecord():
                view.put_model(write)
                touched.add(write.model_id)
            case FailureRecord():
                view.put_failure(write)
                touched.add(write.model_id)
            case LastUsed():
                view.put_last_used(write.instance_id, write.at_ms)
                view.put_use_scores(write.scores)
            case Gone():
                _take_out(view, write, revision)
                touched.add(write.name)
            case _:
                assert_never(write)
    if changes:
        view.advance(changes[-1][0])
    return touched


def _take_out(view: ClusterView, gone: Gone, revision: int) -> None:
    if gone.family is CopyRecord:
        view.delete_copy(gone.name, gone.instance_id, revision)
    elif gone.family is InstanceRecord:
        view.delete_instance(gone.name)
    elif gone.family is ModelRecord:
        view.delete_model(gone.name)
    elif gone.family is FailureRecord:
        view.delete_failure(gone.name, gone.instance_id)
    else:
        view.delete_last_used(gone.name)
