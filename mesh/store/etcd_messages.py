"""Between the words of ``mesh.store.api`` and etcd's messages. Pure.

``KeySpace`` puts ``/<prefix>/<namespace>/`` in front of keys and takes it off again. Keys that are
not UTF-8 (somebody else's) survive the way there and back.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, assert_never

from mesh.core.errors import InvalidArgument
from mesh.store.api import (
    Condition,
    Delete,
    KeyAbsent,
    KeyExists,
    KeyValue,
    ModRevisionIs,
    Operation,
    PrefixUnchangedSince,
    Put,
)
from protos import etcd_pb2


def range_end_of(prefix: bytes) -> bytes:
    """The first key that does not start with ``prefix``: etcd's way to say "all that do"."""
    end = bytearray(prefix)
    while end:
        if end[-1] < 0xFF:
            end[-1] += 1
            return bytes(end)
        end.pop()
    return b"\0"  # etcd: to the end of all keys


class KeySpace:
    """The part of etcd that is this mesh's."""

    def __init__(self, prefix: str, namespace: str) -> None:
        self.root = f"/{_segment(prefix, 'prefix')}/{_segment(namespace, 'namespace')}/"
        self._root_bytes = self.root.encode()
        self._root_length = len(self._root_bytes)

    def key(self, key: str) -> bytes:
        if not key:
            raise InvalidArgument("an empty key: give the key below the mesh's own prefix")
        return self._root_bytes + key.encode("utf-8", "surrogateescape")

    def span(self, prefix: str) -> tuple[bytes, bytes]:
        """``key`` and ``range_end`` of all keys under a prefix."""
        start = self._root_bytes + prefix.encode("utf-8", "surrogateescape")
        return start, range_end_of(start)

    def relative(self, key: bytes) -> str:
        return key[self._root_length :].decode("utf-8", "surrogateescape")

    def items(self, kvs: Iterable[Any]) -> list[KeyValue]:
        """From etcd's ``KeyValue`` messages."""
        relative = self.relative
        return [
            KeyValue(relative(kv.key), kv.value, kv.create_revision, kv.mod_revision, kv.lease)
            for kv in kvs
        ]

    def events(self, events: Iterable[Any]) -> list[Put | Delete]:
        """From etcd's ``Event`` messages."""
        relative = self.relative
        deleted = etcd_pb2.Event.DELETE
        out: list[Put | Delete] = []
        for event in events:
            kv = event.kv
            if event.type == deleted:
                out.append(Delete(relative(kv.key), kv.mod_revision))
            else:
                out.append(
                    Put(relative(kv.key), kv.value, kv.lease, kv.mod_revision, kv.create_revision)
                )
        return out

    def txn(
        self,
        conditions: Sequence[Condition],
        operations: Sequence[Operation],
        reads: Sequence[str],
    ) -> etcd_pb2.TxnRequest:
        return etcd_pb2.TxnRequest(
            compare=[self._compare(condition) for condition in conditions],
            success=[self._operation(operation) for operation in operations],
            failure=[self._read(prefix) for prefix in reads],
        )

    def _compare(self, condition: Condition) -> etcd_pb2.Compare:
        compare = etcd_pb2.Compare
        match condition:
            case KeyAbsent(key):
                return compare(
                    key=self.key(key), target=compare.VERSION, result=compare.EQUAL, version=0
                )
            case KeyExists(key):
                return compare(
                    key=self.key(key), target=compare.VERSION, result=compare.GREATER, version=0
                )
            case ModRevisionIs(key, mod_revision):
                return compare(
                    key=self.key(key),
                    target=compare.MOD,
                    result=compare.EQUAL,
                    mod_revision=mod_revision,
                )
            case PrefixUnchangedSince(prefix, revision):
                # Holds for every key of the range; for an empty range etcd compares with 0.
                start, end = self.span(prefix)
                return compare(
                    key=start,
                    range_end=end,
                    target=compare.MOD,
                    result=compare.LESS,
                    mod_revision=revision + 1,
                )
            case _:
                assert_never(condition)

    def _operation(self, operation: Operation) -> etcd_pb2.RequestOp:
        match operation:
            case Put():
                put = etcd_pb2.PutRequest(
                    key=self.key(operation.key), value=operation.value, lease=operation.lease_id
                )
                return etcd_pb2.RequestOp(request_put=put)
            case Delete():
                if operation.prefix:
                    start, end = self.span(operation.key)
                    delete = etcd_pb2.DeleteRangeRequest(key=start, range_end=end)
                else:
                    delete = etcd_pb2.DeleteRangeRequest(key=self.key(operation.key))
                return etcd_pb2.RequestOp(request_delete_range=delete)
            case _:
                assert_never(operation)

    def _read(self, prefix: str) -> etcd_pb2.RequestOp:
        start, end = self.span(prefix)
        return etcd_pb2.RequestOp(request_range=etcd_pb2.RangeRequest(key=start, range_end=end))


def _segment(text: str, what: str) -> str:
    stripped = text.strip("/")
    if not stripped:
        raise InvalidArgument(f"the {what} of the keys in etcd is empty")
    return stripped
