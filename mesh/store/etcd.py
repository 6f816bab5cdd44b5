"""The mesh's store on etcd v3: ``EtcdStore``, an implementation of ``mesh.store.api.KVStore``.

A watch is a loop of its own: a range at one revision, then the changes after it; a broken stream
is opened again after the last change that was delivered, and where etcd has compacted that away,
or its revision went backwards (restored from a backup), the range is read anew and handed on as a
``Snapshot``. It ends only when the store is closed.

gRPC and etcd's messages live in this file and its neighbours ``etcd_rpc.py`` (connections, time
outs, errors), ``etcd_messages.py`` (conversions) and ``etcd_lease.py``; nothing else speaks etcd.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Final

from mesh.core.errors import InvalidArgument
from mesh.store.api import (
    Changes,
    Condition,
    KeyValue,
    Operation,
    Snapshot,
    StoreDenied,
    StoreUnavailable,
    TxnResult,
    check_txn,
)
from mesh.store.etcd_lease import EtcdLease
from mesh.store.etcd_messages import KeySpace
from mesh.store.etcd_options import EtcdOptions
from mesh.store.etcd_rpc import (
    COMPACT,
    DELETE_RANGE,
    LEASE_GRANT,
    PUT,
    RANGE,
    STATUS,
    TXN,
    WATCH,
    Compacted,
    EtcdRpc,
    LeaseExists,
)
from protos import etcd_pb2

logger = logging.getLogger(__name__)

# A range in pages starts again when a compaction takes its revision away, at most so often.
_RANGE_TRIES: Final = 5
# While etcd is away a line is logged at most this often for each watch and for the start.
_LOG_EVERY_S: Final = 10.0


class EtcdStore:
    """Keys below ``/<prefix>/<namespace>/`` of an etcd. One event loop; no thread."""

    def __init__(
        self, options: EtcdOptions, *, prefix: str = "mesh", namespace: str = "default"
    ) -> None:
        self._keys = KeySpace(prefix, namespace)
        self._rpc = EtcdRpc(options)
        self._leases: set[EtcdLease] = set()

    @property
    def root(self) -> str:
        """What stands in front of every key in etcd."""
        return self._keys.root

    async def wait_ready(self) -> None:
        """Until etcd answers a linearised read. Raises StoreDenied when it refuses us."""
        failures = 0
        logged = _Seldom()
        while True:
            try:
                await self._range_page(
                    *self._keys.span(""), limit=1, revision=0, what="a first read"
                )
            except StoreUnavailable as error:
                if self._rpc.closed:
                    raise
                failures += 1
                if logged.due():
                    logger.warning("waiting for etcd at %s: %s", self._rpc.endpoint_text, error)
                await self._rpc.pause(failures)
                continue
            if failures:
                logger.info("etcd at %s answers", self._rpc.endpoint_text)
            return

    async def server_version(self) -> str:
        """Of the member that answers, as ``3.4.23``."""
        request = etcd_pb2.StatusRequest()
        reply = await self._rpc.call(STATUS, request, "its status", idempotent=True)
        return str(reply.version)

    async def get(self, key: str) -> KeyValue | None:
        request = etcd_pb2.RangeRequest(key=self._keys.key(key))
        reply = await self._rpc.call(RANGE, request, f"a get of {key!r}", idempotent=True)
        items = self._keys.items(reply.kvs)
        return items[0] if items else None

    async def range(self, prefix: str, *, page_size: int = 1_000) -> Snapshot:
        if page_size < 1:
            raise InvalidArgument(f"page_size is {page_size}; it must be at least 1")
        for _ in range(_RANGE_TRIES):
            try:
                return await self._range_at_one_revision(prefix, page_size)
            except Compacted:
                continue
        raise StoreUnavailable(
            f"reading {self.root}{prefix} in pages of {page_size} is slower than etcd compacts; "
            "let its auto-compaction keep more history"
        )

    async def _range_at_one_revision(self, prefix: str, page_size: int) -> Snapshot:
        start, end = self._keys.span(prefix)
        items: list[KeyValue] = []
        revision = 0
        while True:
            page = await self._range_page(
                start, end, limit=page_size, revision=revision, what=f"a range of {prefix!r}"
            )
            # Later pages are read as of the first one's revision.
            revision = revision or page.header.revision
            items += self._keys.items(page.kvs)
            if not page.more:
                return Snapshot(tuple(items), revision)
            start = page.kvs[-1].key + b"\0"

    async def _range_page(
        self, start: bytes, end: bytes, *, limit: int, revision: int, what: str
    ) -> Any:
        request = etcd_pb2.RangeRequest(key=start, range_end=end, limit=limit, revision=revision)
        return await self._rpc.call(RANGE, request, what, idempotent=True)

    async def put(self, key: str, value: bytes, *, lease_id: int = 0) -> int:
        request = etcd_pb2.PutRequest(key=self._keys.key(key), value=value, lease=lease_id)
        reply = await self._rpc.call(PUT, request, f"a put of {key!r}", idempotent=False)
        return int(reply.header.revision)

    async def delete(self, key: str) -> bool:
        request = etcd_pb2.DeleteRangeRequest(key=self._keys.key(key))
        reply = await self._rpc.call(
            DELETE_RANGE, request, f"a delete of {key!r}", idempotent=False
        )
        return bool(reply.deleted)

    async def txn(
        self,
        conditions: Sequence[Condition],
        operations: Sequence[Operation],
        *,
        read_on_failure: Sequence[str] = (),
    ) -> TxnResult:
        check_txn(conditions, operations, read_on_failure)
        request = self._keys.txn(conditions, operations, read_on_failure)
        first = operations[0].key if operations else "nothing"
        what = f"a transaction on {first!r}"
        reply = await self._rpc.call(TXN, request, what, idempotent=not operations)
        read: tuple[KeyValue, ...] = ()
        if not reply.succeeded:
            kvs = [kv for response in reply.responses for kv in response.response_range.kvs]
            read = tuple(self._keys.items(kvs))
        return TxnResult(reply.succeeded, reply.header.revision, read)

    async def compact(self, revision: int) -> None:
        """Forget history up to ``revision``. etcd's own auto-compaction does it as a rule."""
        request = etcd_pb2.CompactionRequest(revision=revision, physical=True)
        await self._rpc.call(COMPACT, request, "a compaction", idempotent=False)

    async def lease(self, ttl_ms: int) -> EtcdLease:
        if ttl_ms < 1:
            raise InvalidArgument(f"a lease of {ttl_ms} ms; it must be at least 1 ms")
        # With an id of our own a repeated grant is recognised instead of leaving a lease behind.
        lease_id = random.getrandbits(62) + 1
        request = etcd_pb2.LeaseGrantRequest(TTL=-(-ttl_ms // 1_000), ID=lease_id)
        asked_at_s = asyncio.get_running_loop().time()
        try:
            reply = await self._rpc.call(LEASE_GRANT, request, "granting a lease", idempotent=True)
            granted_ms = int(reply.TTL) * 1_000
        except LeaseExists:
            granted_ms = int(request.TTL) * 1_000
        self._leases = {lease for lease in self._leases if not lease.lost}
        lease = EtcdLease(self._rpc, self._keys, lease_id, granted_ms, asked_at_s)
        self._leases.add(lease)
        return lease

    async def watch(self, prefix: str) -> AsyncIterator[Snapshot | Changes]:
        next_revision = 0  # 0: a snapshot is wanted
        failures = 0
        logged = _Seldom()
        while not self._rpc.closed:
            try:
                if next_revision == 0:
                    snapshot = await self.range(prefix)
                    next_revision = snapshot.revision + 1
                    yield snapshot
                async with aclosing(self._changes(prefix, next_revision)) as stream:
                    async for changes in stream:
                        if failures:
                            logger.info("the watch of %s%s goes on", self.root, prefix)
                        failures = 0
                        next_revision = changes.revision + 1
                        if changes.events:
                            yield changes
            except Compacted:
                logger.info("history of %s%s is compacted: reading it anew", self.root, prefix)
                next_revision = 0
            except (StoreUnavailable, StoreDenied) as error:
                if self._rpc.closed:
                    return
                failures += 1
                if logged.due():
                    logger.warning("the watch of %s%s waits: %s", self.root, prefix, error)
                await self._rpc.pause(failures)

    async def _changes(self, prefix: str, start_revision: int) -> AsyncGenerator[Changes, None]:
        """One stream from ``start_revision`` on, until it breaks; empty Changes are progress.

        Only events and progress notices move the position: the revision in the header of other
        answers may be ahead of events that are still to come.
        """
        timeout_s = self._rpc.options.call_timeout_ms / 1_000
        request = self._watch_request(prefix, start_revision)
        async with self._rpc.stream(WATCH, request, f"the watch of {prefix!r}") as stream:
            created = await stream.read(timeout_s)
            if created.canceled:
                _raise_cancelled(created)
            if created.header.revision < start_revision - 1:
                # This etcd knows less than we have seen: another one, or restored from a backup
                # (or a member that lags, whose range then waits until it has caught up).
                raise Compacted("etcd's revision went backwards")
            yield Changes((), start_revision - 1)  # it stands
            pending: list[Any] = []
            while True:
                reply = await stream.read(timeout_s if pending else None)
                if reply.canceled:
                    _raise_cancelled(reply)
                if reply.fragment or pending:
                    pending.extend(reply.events)
                    if reply.fragment:
                        continue
                events = self._keys.events(pending or reply.events)
                pending = []
                if events:
                    yield Changes(tuple(events), events[-1].mod_revision)
                elif reply.header.revision >= start_revision:
                    yield Changes((), reply.header.revision)

    def _watch_request(self, prefix: str, start_revision: int) -> etcd_pb2.WatchRequest:
        start, end = self._keys.span(prefix)
        create = etcd_pb2.WatchCreateRequest(
            key=start,
            range_end=end,
            start_revision=start_revision,
            progress_notify=True,
            fragment=True,
        )
        return etcd_pb2.WatchRequest(create_request=create)

    async def close(self) -> None:
        await asyncio.gather(*(lease.stop() for lease in self._leases))
        await self._rpc.close()


def _raise_cancelled(reply: Any) -> None:
    if reply.compact_revision > 0:
        raise Compacted(f"compacted at {reply.compact_revision}")
    raise StoreUnavailable(f"etcd cancelled the watch: {reply.cancel_reason or 'no reason given'}")


class _Seldom:
    """Lets a line of a loop through now and then."""

    def __init__(self) -> None:
        self._next_s = 0.0

    def due(self) -> bool:
        now_s = asyncio.get_running_loop().time()
        if now_s < self._next_s:
            return False
        self._next_s = now_s + _LOG_EVERY_S
        return True
