"""A key-value store in memory, with the whole contract of ``mesh.store.api`` and scripted faults.

``MemoryServer`` plays etcd: the data, the history, the leases. ``MemoryStore`` plays one client's
connection to it; ``peer()`` opens another one, so that two routers and an instance in one test each
have their own, and one of them can be cut off alone. Time is the running loop's (``call_later``),
so that a test in virtual time sees leases expire without waiting.

Faults are methods, each the thing that happens to a real etcd: ``server.go_away`` / ``come_back``,
``server.cut_watches`` / ``restore_watches``, ``server.lose_history`` (a compaction),
``server.resync_watches``, ``server.expire_lease``, ``server.fail_next``, ``server.hold_calls`` /
``release_calls``, ``store.partition`` / ``heal``. Not for production: nothing is on disk.
"""

from __future__ import annotations

import asyncio
from bisect import bisect_left, insort
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, assert_never

from mesh.core.errors import InvalidArgument
from mesh.store.api import (
    Changes,
    Condition,
    Delete,
    KeyAbsent,
    KeyExists,
    KeyValue,
    LeaseNotFound,
    ModRevisionIs,
    Operation,
    PrefixUnchangedSince,
    Put,
    Snapshot,
    StoreUnavailable,
    TxnResult,
    check_txn,
)

# Events kept for watches that lag; older ones are compacted away, and such a watch starts afresh.
MAX_HISTORY_EVENTS: Final = 200_000


@dataclass(slots=True)
class _Fault:
    """One scripted failure: the next call raises; a write may have been applied all the same."""

    error: Exception
    applied: bool


class MemoryServer:
    """What stands on the far side of the wire. Not for more than one event loop."""

    def __init__(self) -> None:
        self.revision = 1
        self.compacted_revision = 0
        self.available = True
        self.watches_cut = False
        self._keys: list[str] = []  # sorted
        self._data: dict[str, KeyValue] = {}
        self._history: list[Put | Delete] = []
        self._history_revisions: list[int] = []  # parallel to _history
        self._leases: dict[int, MemoryLease] = {}
        self._next_lease_id = 0x1001
        self._faults: list[_Fault | None] = []  # of the next calls; None: this one works
        self._watchers: set[_Watcher] = set()
        self._clients: list[MemoryStore] = []
        self._open_gate = asyncio.Event()
        self._open_gate.set()

    # --- scripted faults -------------------------------------------------------------------

    def go_away(self) -> None:
        """Nothing answers; watches stall; no lease expires, as in an etcd that is down."""
        self.available = False
        self._refresh_leases()

    def come_back(self) -> None:
        """Answers again. As after an etcd election, every lease gets its whole time anew."""
        self.available = True
        self._refresh_leases(restart=True)
        self._wake()

    def cut_watches(self) -> None:
        """Watches deliver nothing until ``restore_watches``; calls work."""
        self.watches_cut = True

    def restore_watches(self) -> None:
        self.watches_cut = False
        self._wake()

    def lose_history(self) -> None:
        """Compact at the present revision: a watch that has not yet seen it gets a Snapshot."""
        self._compact(self.revision)

    def resync_watches(self) -> None:
        """Every watch gets a fresh Snapshot now, although it missed nothing."""
        for watcher in self._watchers:
            watcher.next_revision = 0
        self._wake()

    def expire_lease(self, lease_id: int) -> None:
        """The lease runs out now; its keys go in one revision. Unknown ids are no error."""
        lease = self._leases.get(lease_id)
        if lease is not None:
            self._drop_lease(lease)

    def fail_next(
        self,
        count: int = 1,
        *,
        after: int = 0,
        applied: bool = False,
        error: Exception | None = None,
    ) -> None:
        """The next ``count`` calls raise ``error``; with ``applied`` they take effect first.

        ``after`` so many calls that work. What is scripted already comes before.
        """
        self._faults += [None] * after
        for _ in range(count):
            fault = error or StoreUnavailable("scripted fault: the store did not answer in time")
            self._faults.append(_Fault(fault, applied))

    def hold_calls(self) -> None:
        """Calls hang (nothing is lost) until ``release_calls``."""
        self._open_gate.clear()

    def release_calls(self) -> None:
        self._open_gate.set()

    # --- reading ---------------------------------------------------------------------------

    def keys(self, prefix: str = "") -> list[str]:
        """The keys under ``prefix``, sorted; for assertions."""
        low = bisect_left(self._keys, prefix)
        high = low
        while high < len(self._keys) and self._keys[high].startswith(prefix):
            high += 1
        return self._keys[low:high]

    def read(self, prefix: str) -> tuple[KeyValue, ...]:
        return tuple(self._data[key] for key in self.keys(prefix))

    def get(self, key: str) -> KeyValue | None:
        return self._data.get(key)

    def holds(self, condition: Condition) -> bool:
        match condition:
            case KeyAbsent(key):
                return key not in self._data
            case KeyExists(key):
                return key in self._data
            case ModRevisionIs(key, mod_revision):
                found = self._data.get(key)
                return found is not None and found.mod_revision == mod_revision
            case PrefixUnchangedSince(prefix, revision):
                return all(item.mod_revision <= revision for item in self.read(prefix))
            case _:
                assert_never(condition)

    def events_since(self, revision: int, prefix: str) -> tuple[Put | Delete, ...]:
        """Events at ``revision`` and later under ``prefix``, in order."""
        start = bisect_left(self._history_revisions, revision)
        return tuple(e for e in self._history[start:] if e.key.startswith(prefix))

    # --- writing ---------------------------------------------------------------------------

    def apply(self, operations: Sequence[Operation]) -> int:
        """Carry out all operations as one revision; returns how many keys were deleted."""
        for operation in operations:
            if isinstance(operation, Put) and operation.lease_id not in (0, *self._leases):
                raise LeaseNotFound(
                    f"lease {operation.lease_id:x} of key {operation.key!r} has expired"
                )
        revision = self.revision + 1
        events: list[Put | Delete] = []
        for operation in operations:
            if isinstance(operation, Put):
                events.append(self._put(operation, revision))
            else:
                doomed = self.keys(operation.key) if operation.prefix else [operation.key]
                events += [Delete(key, revision) for key in doomed if self._remove(key)]
        if events:
            self.revision = revision
            self._history += events
            self._history_revisions += [revision] * len(events)
            if len(self._history) > MAX_HISTORY_EVENTS:
                self._compact(self._history_revisions[MAX_HISTORY_EVENTS // 2])
            self._wake()
        return sum(isinstance(event, Delete) for event in events)

    def _put(self, operation: Put, revision: int) -> Put:
        before = self._data.get(operation.key)
        if before is None:
            insort(self._keys, operation.key)
        created = revision if before is None else before.create_revision
        self._data[operation.key] = KeyValue(
            operation.key, operation.value, created, revision, operation.lease_id
        )
        return Put(operation.key, operation.value, operation.lease_id, revision, created)

    def _remove(self, key: str) -> bool:
        if self._data.pop(key, None) is None:
            return False
        del self._keys[bisect_left(self._keys, key)]
        return True

    def _compact(self, revision: int) -> None:
        self.compacted_revision = revision
        cut = bisect_left(self._history_revisions, revision + 1)
        del self._history[:cut], self._history_revisions[:cut]

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.wake.set()

    # --- connections, leases, watches --------------------------------------------------------

    def attach(self, client: MemoryStore) -> None:
        self._clients.append(client)

    def grant(self, owner: MemoryStore, ttl_ms: int) -> MemoryLease:
        lease = MemoryLease(self, owner, self._next_lease_id, ttl_ms)
        self._next_lease_id += 1
        self._leases[lease.lease_id] = lease
        return lease

    def keys_of_lease(self, lease_id: int) -> frozenset[str]:
        if lease_id not in self._leases:
            raise LeaseNotFound(f"lease {lease_id:x} has expired")
        return frozenset(key for key, kv in self._data.items() if kv.lease_id == lease_id)

    def _drop_lease(self, lease: MemoryLease) -> None:
        """The lease ends and its keys with it; its owner is told when it can be reached."""
        self._leases.pop(lease.lease_id, None)
        doomed = [key for key, kv in self._data.items() if kv.lease_id == lease.lease_id]
        self.apply([Delete(key) for key in doomed])
        lease.ended_in_store()

    def revoke(self, lease: MemoryLease) -> None:
        if lease.lease_id in self._leases:
            self._drop_lease(lease)

    def _refresh_leases(self, *, restart: bool = False) -> None:
        """A lease's clock runs only while the server is up and its owner is not connected."""
        for lease in list(self._leases.values()):
            lease.set_running(self.available and not lease.owner.connected, restart=restart)

    async def admit(self, client: MemoryStore) -> _Fault | None:
        """One round trip to the server: yields to the loop, then fails as scripted."""
        await asyncio.sleep(0)
        await self._open_gate.wait()
        client.check_connected()
        fault = self._faults.pop(0) if self._faults else None
        if fault is not None and not fault.applied:
            raise fault.error
        return fault

    def connection_changed(self, client: MemoryStore) -> None:
        self._refresh_leases()
        for lease in list(client.leases):
            lease.notice()
        self._wake()

    def add_watcher(self, watcher: _Watcher) -> None:
        self._watchers.add(watcher)

    def remove_watcher(self, watcher: _Watcher) -> None:
        self._watchers.discard(watcher)


class _Watcher:
    """Where one watch stands; ``next_revision`` 0 asks for a Snapshot."""

    def __init__(self, prefix: str) -> None:
        self.prefix = prefix
        self.next_revision = 0
        self.wake = asyncio.Event()


class MemoryLease:
    """A lease of a ``MemoryServer``; see ``mesh.store.api.Lease``."""

    def __init__(
        self, server: MemoryServer, owner: MemoryStore, lease_id: int, ttl_ms: int
    ) -> None:
        self.owner = owner
        self._server = server
        self._lease_id = lease_id
        self._ttl_ms = ttl_ms
        self._ended = False
        self._lost = asyncio.Event()
        self._timer: asyncio.TimerHandle | None = None

    @property
    def lease_id(self) -> int:
        return self._lease_id

    @property
    def lost(self) -> bool:
        return self._lost.is_set()

    @property
    def remaining_ms(self) -> int:
        if self._ended:
            return 0
        if self._timer is None:
            return self._ttl_ms if self._server.available else 0
        return max(0, int((self._timer.when() - asyncio.get_running_loop().time()) * 1_000))

    async def wait_lost(self) -> None:
        await self._lost.wait()

    async def keys(self) -> frozenset[str]:
        _raise(await self._server.admit(self.owner))
        return self._server.keys_of_lease(self._lease_id)

    async def revoke(self) -> None:
        self.owner.leases.discard(self)
        await self._server.admit(self.owner)
        self._server.revoke(self)

    def set_running(self, running: bool, *, restart: bool) -> None:
        """Start or stop the time that is left; called by the server."""
        if self._timer is not None and (not running or restart):
            self._timer.cancel()
            self._timer = None
        if running and self._timer is None:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_later(
                self._ttl_ms / 1_000, self._server.expire_lease, self._lease_id
            )

    def ended_in_store(self) -> None:
        self._ended = True
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.notice()

    def notice(self) -> None:
        """The owner learns the truth once it is connected; a revoked lease is not a lost one."""
        if self._ended and self.owner.connected and self in self.owner.leases:
            self._lost.set()
            self.owner.leases.discard(self)


class MemoryStore:
    """One connection to a ``MemoryServer``; implements ``mesh.store.api.KVStore``."""

    def __init__(self, server: MemoryServer | None = None) -> None:
        self.server = server or MemoryServer()
        self.leases: set[MemoryLease] = set()
        self._reachable = True
        self._closed = False
        self.server.attach(self)

    def peer(self) -> MemoryStore:
        """Another connection to the same server."""
        return MemoryStore(self.server)

    @property
    def connected(self) -> bool:
        return self._reachable and not self._closed

    def partition(self) -> None:
        """Cut this client off: its calls fail, its watches stall, its leases run out."""
        self._reachable = False
        self.server.connection_changed(self)

    def heal(self) -> None:
        self._reachable = True
        self.server.connection_changed(self)

    def check_connected(self) -> None:
        if self._closed:
            raise StoreUnavailable("the store client is closed")
        if not (self._reachable and self.server.available):
            raise StoreUnavailable("the store in memory was told to be away")

    async def wait_ready(self) -> None:
        watcher = _Watcher("")
        self.server.add_watcher(watcher)
        try:
            while not (self._closed or (self._reachable and self.server.available)):
                watcher.wake.clear()
                await watcher.wake.wait()
        finally:
            self.server.remove_watcher(watcher)
        if self._closed:
            raise StoreUnavailable("the store client is closed")

    async def get(self, key: str) -> KeyValue | None:
        fault = await self.server.admit(self)
        _raise(fault)
        return self.server.get(key)

    async def range(self, prefix: str, *, page_size: int = 1_000) -> Snapshot:
        if page_size < 1:
            raise InvalidArgument(f"page_size is {page_size}; it must be at least 1")
        fault = await self.server.admit(self)
        _raise(fault)
        return Snapshot(self.server.read(prefix), self.server.revision)

    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        fault = await self.server.admit(self)
        self.server.apply([Put(key, value, lease_id)])
        revision = self.server.revision
        _raise(fault)
        return revision

    async def delete(self, key: str) -> bool:
        fault = await self.server.admit(self)
        existed = self.server.apply([Delete(key)]) > 0
        _raise(fault)
        return existed

    async def txn(
        self,
        conditions: Sequence[Condition],
        operations: Sequence[Operation],
        *,
        read_on_failure: Sequence[str] = (),
    ) -> TxnResult:
        check_txn(conditions, operations, read_on_failure)
        fault = await self.server.admit(self)
        succeeded = all(self.server.holds(condition) for condition in conditions)
        read: tuple[KeyValue, ...] = ()
        if succeeded:
            self.server.apply(operations)
        else:
            read = tuple(kv for prefix in read_on_failure for kv in self.server.read(prefix))
        result = TxnResult(succeeded, self.server.revision, read)
        _raise(fault)
        return result

    async def watch(self, prefix: str) -> AsyncIterator[Snapshot | Changes]:
        server = self.server
        watcher = _Watcher(prefix)
        server.add_watcher(watcher)
        try:
            while not self._closed:
                watcher.wake.clear()
                if server.watches_cut or not (self._reachable and server.available):
                    await watcher.wake.wait()
                elif watcher.next_revision <= server.compacted_revision:
                    revision = server.revision
                    watcher.next_revision = revision + 1
                    yield Snapshot(server.read(prefix), revision)
                elif events := server.events_since(watcher.next_revision, prefix):
                    revision = events[-1].mod_revision
                    watcher.next_revision = revision + 1
                    yield Changes(events, revision)
                else:
                    await watcher.wake.wait()
        finally:
            server.remove_watcher(watcher)

    async def lease(self, ttl_ms: int) -> MemoryLease:
        if ttl_ms < 1:
            raise InvalidArgument(f"a lease of {ttl_ms} ms; it must be at least 1 ms")
        fault = await self.server.admit(self)
        _raise(fault)
        lease = self.server.grant(self, ttl_ms)
        self.leases.add(lease)
        return lease

    async def close(self) -> None:
        self._closed = True
        self.server.connection_changed(self)


def _raise(fault: _Fault | None) -> None:
    if fault is not None:
        raise fault.error
