"""What the mesh asks of a key-value store, and the rules that every implementation keeps.

* A revision is a number that grows with every change of the whole store, as in etcd v3.
* ``txn`` is atomic; a batch holds at most ``MAX_TXN_OPS`` operations.
* A watch never misses a change: after a disconnect, a restart of the store or a compaction it
  goes on by itself; where history is gone it delivers a ``Snapshot`` of the prefix instead of the
  lost events, so a consumer is always able to be level-triggered.
* Keys and values are bytes. Keys given here are relative: the implementation puts the prefix
  ``/<prefix>/<namespace>/`` in front and takes it off again.
* While the store is away calls raise ``StoreUnavailable``; watches wait and resume. A write that
  raised ``StoreUnavailable`` may or may not have been applied: read, or write by compare-and-swap.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Final, Protocol

from mesh.core.errors import FailedPrecondition, InvalidArgument, Unavailable

MAX_TXN_OPS: Final = 128  # etcd's default


class StoreUnavailable(Unavailable):
    """The store cannot be reached, has no leader, or did not answer in time."""


class StoreFull(StoreUnavailable):
    """etcd raised NOSPACE: its quota is used up; compact, defragment, disarm the alarm."""


class StoreDenied(FailedPrecondition):
    """The store refuses who we are or what we ask: user, password, certificate or permission."""


class LeaseNotFound(Unavailable):
    """A write named a lease that has expired or was revoked: take a new one and publish anew."""


@dataclass(frozen=True, slots=True)
class KeyValue:
    key: str
    value: bytes
    create_revision: int
    mod_revision: int
    lease_id: int = 0


@dataclass(frozen=True, slots=True)
class Put:
    """An event, or an operation of a transaction (then only key, value, lease_id count)."""

    key: str
    value: bytes
    lease_id: int = 0
    mod_revision: int = 0
    create_revision: int = 0


@dataclass(frozen=True, slots=True)
class Delete:
    """An event, or an operation of a transaction. ``prefix`` deletes all keys that start so."""

    key: str
    mod_revision: int = 0
    prefix: bool = False


@dataclass(frozen=True, slots=True)
class KeyAbsent:
    """Condition: the key does not exist."""

    key: str


@dataclass(frozen=True, slots=True)
class KeyExists:
    """Condition: the key exists."""

    key: str


@dataclass(frozen=True, slots=True)
class ModRevisionIs:
    """Condition: the key exists and was last changed at exactly this revision."""

    key: str
    mod_revision: int


@dataclass(frozen=True, slots=True)
class PrefixUnchangedSince:
    """Condition: no key under ``prefix`` that exists now was changed after ``revision``."""

    prefix: str
    revision: int


Condition = KeyAbsent | KeyExists | ModRevisionIs | PrefixUnchangedSince
Operation = Put | Delete


@dataclass(frozen=True, slots=True)
class TxnResult:
    succeeded: bool
    revision: int
    # the present state of the keys asked for in ``read_on_failure``, when not succeeded
    read: tuple[KeyValue, ...] = ()


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All keys of a prefix as of ``revision``: replaces whatever the consumer knew of it."""

    items: tuple[KeyValue, ...]
    revision: int


@dataclass(frozen=True, slots=True)
class Changes:
    """Events in order, all up to ``revision``."""

    events: tuple[Put | Delete, ...]
    revision: int


class Lease(Protocol):
    """A lease that the store keeps alive by itself until ``revoke`` or ``close``."""

    @property
    def lease_id(self) -> int: ...

    @property
    def lost(self) -> bool:
        """True once the store has let it expire; take a new one and publish anew."""
        ...

    @property
    def remaining_ms(self) -> int:
        """For how long the store certainly keeps it, as far as is known here; 0 when unsure.

        A holder of a lock must not act as its holder at 0, although the lease may still live.
        """
        ...

    async def wait_lost(self) -> None:
        """Return when the lease is lost."""
        ...

    async def keys(self) -> frozenset[str]:
        """The keys that stand under it now; those outside the mesh's prefix are not told.

        Raises LeaseNotFound when the store does not have it (any more).
        """
        ...

    async def revoke(self) -> None: ...


class KVStore(Protocol):
    async def wait_ready(self) -> None:
        """Return when the store answers; waits for ever, and says in the log what it waits for."""
        ...

    async def get(self, key: str) -> KeyValue | None: ...

    async def range(self, prefix: str, *, page_size: int = 1_000) -> Snapshot:
        """All keys under ``prefix`` at one revision, fetched in pages. "" is everything."""
        ...

    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        """Returns the revision."""
        ...

    async def delete(self, key: str) -> bool:
        """Returns whether it existed."""
        ...

    async def txn(
        self,
        conditions: Sequence[Condition],
        operations: Sequence[Operation],
        *,
        read_on_failure: Sequence[str] = (),
    ) -> TxnResult:
        """All operations if all conditions hold. ``read_on_failure`` are prefixes to be read."""
        ...

    def watch(self, prefix: str) -> AsyncIterator[Snapshot | Changes]:
        """First a Snapshot, then Changes for ever (again a Snapshot after history was lost)."""
        ...

    async def lease(self, ttl_ms: int) -> Lease:
        """A new lease. The store may round ``ttl_ms`` up (etcd: to whole seconds)."""
        ...

    async def close(self) -> None:
        """Watches end, keep-alives stop, calls fail. Leases are not revoked: they run out."""
        ...


def check_txn(
    conditions: Sequence[Condition], operations: Sequence[Operation], reads: Sequence[str]
) -> None:
    """Refuse what etcd would refuse, with a message that names the key.

    Raises InvalidArgument when a list is longer than ``MAX_TXN_OPS``, or when a key is put twice,
    or both put and deleted: such a transaction has no meaning in etcd.
    """
    longest = max(len(conditions), len(operations), len(reads))
    if longest > MAX_TXN_OPS:
        raise InvalidArgument(
            f"a transaction of {longest} items is over the limit of {MAX_TXN_OPS}: split it"
        )
    put_keys: set[str] = set()
    for operation in operations:
        if isinstance(operation, Put):
            if operation.key in put_keys:
                raise InvalidArgument(f"key {operation.key!r} is put twice in one transaction")
            put_keys.add(operation.key)
    if not put_keys:
        return
    for operation in operations:
        if isinstance(operation, Delete):
            if operation.prefix:
                hit = next((key for key in put_keys if key.startswith(operation.key)), None)
            else:
                hit = operation.key if operation.key in put_keys else None
            if hit is not None:
                raise InvalidArgument(f"key {hit!r} is put and deleted in one transaction")
