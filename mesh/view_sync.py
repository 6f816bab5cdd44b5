"""Feeds a view of the whole mesh from one watch of everything: the only writer of that view.

It owns the loop and the decoding; what the records mean is the consumer's (``ClusterView``). A
value that cannot be decoded is counted, logged and skipped: one bad record must not blind a router
to the other hundred thousand. In a snapshot such a record is absent; on a change the consumer keeps
what it knew. Keys of no known family are a newer version's and are passed over in silence.

The loop ends only when the store is closed. An error of the consumer is a defect and ends it.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Final, Protocol

from mesh.core.types import (
    CopyRecord,
    FailureRecord,
    InstanceRecord,
    ModelRecord,
    VModelRecord,
)
from mesh.registry import (
    Family,
    Key,
    RecordError,
    decode_config,
    decode_copy,
    decode_failure,
    decode_instance,
    decode_model,
    decode_uses,
    decode_vmodel,
    parse_key,
)
from mesh.store.api import Changes, KVStore, Put, Snapshot

logger = logging.getLogger(__name__)

# Records decoded in one turn of the loop: about 10 ms, so that requests are served in between.
_DECODE_SLICE: Final = 500
# Undecodable values that are logged one by one; the counter goes on.
_MAX_LOGGED: Final = 20

# Ids of the models that a step told something of; None: anything may have changed.
OnStep = Callable[[frozenset[str] | None], None]


class ViewConsumer(Protocol):
    """What ``mesh.core.view.ClusterView`` takes."""

    def put_model(self, record: ModelRecord) -> None: ...
    def delete_model(self, model_id: str) -> None: ...
    def replace_models(self, records: Iterable[ModelRecord]) -> None: ...
    def put_last_used(self, instance_id: str, last_used_at_ms: Mapping[str, int]) -> None: ...
    def delete_last_used(self, instance_id: str) -> None: ...
    def replace_last_used(self, blobs: Mapping[str, Mapping[str, int]]) -> None: ...
    def put_use_scores(self, scores: Mapping[str, float]) -> None: ...

    def put_config(self, name: str, value: Mapping[str, object]) -> None: ...
    def delete_config(self, name: str) -> None: ...
    def replace_configs(self, values: Mapping[str, Mapping[str, object]]) -> None: ...

    def put_vmodel(self, record: VModelRecord) -> None: ...
    def delete_vmodel(self, name: str) -> None: ...
    def replace_vmodels(self, records: Iterable[VModelRecord]) -> None: ...

    def put_instance(self, record: InstanceRecord) -> None: ...
    def delete_instance(self, instance_id: str) -> None: ...
    def replace_instances(self, records: Iterable[InstanceRecord]) -> None: ...

    def put_copy(self, record: CopyRecord, mod_revision: int = 0) -> None: ...
    def delete_copy(self, model_id: str, instance_id: str, mod_revision: int = 0) -> None: ...
    def replace_copies(self, records: Iterable[CopyRecord], revision: int = 0) -> None: ...

    def put_failure(self, record: FailureRecord) -> None: ...
    def delete_failure(self, model_id: str, instance_id: str) -> None: ...
    def replace_failures(self, records: Iterable[FailureRecord]) -> None: ...

    def advance(self, revision: int) -> None: ...


class _Decoded:
    """A snapshot's records by family."""

    def __init__(self) -> None:
        self.models: list[ModelRecord] = []
        self.vmodels: list[VModelRecord] = []
        self.instances: list[InstanceRecord] = []
        self.copies: list[CopyRecord] = []
        self.failures: list[FailureRecord] = []
        self.last_used: dict[str, dict[str, int]] = {}
        self.use_scores: list[dict[str, float]] = []
        self.configs: dict[str, dict[str, object]] = {}

    def add(self, key: Key, value: bytes) -> None:
        match key.family:
            case Family.MODEL:
                self.models.append(decode_model(key.name, value))
            case Family.VMODEL:
                self.vmodels.append(decode_vmodel(key.name, value))
            case Family.INSTANCE:
                self.instances.append(decode_instance(key.name, value))
            case Family.COPY:
                self.copies.append(decode_copy(key.name, key.instance_id, value))
            case Family.FAILURE:
                self.failures.append(decode_failure(key.name, key.instance_id, value))
            case Family.LAST_USED:
                uses = decode_uses(key.name, value)
                self.last_used[key.name] = uses.last_used_at_ms
                if uses.scores:
                    self.use_scores.append(uses.scores)
            case Family.CONFIG:
                self.configs[key.name] = decode_config(key.name, value)
            case Family.LEADER:
                return


class ViewSync:
    """Run ``run()`` as a task; wait for ``wait_synced()`` before deciding anything."""

    def __init__(
        self, store: KVStore, consumer: ViewConsumer, *, on_step: OnStep | None = None
    ) -> None:
        self._store = store
        self._consumer = consumer
        self._on_step = on_step
        self._synced = asyncio.Event()
        self.revision = 0
        self.snapshots_total = 0
        self.events_total = 0
        self.undecodable_total = 0

    @property
    def synced(self) -> bool:
        """A first snapshot has been taken in."""
        return self._synced.is_set()

    async def wait_synced(self) -> None:
        await self._synced.wait()

    async def run(self) -> None:
        """Until the store is closed."""
        async for step in self._store.watch(""):
            match step:
                case Snapshot():
                    await self._take_snapshot(step)
                    touched = None
                case Changes():
                    touched = self._take_changes(step)
            self.revision = step.revision
            self._consumer.advance(step.revision)
            if isinstance(step, Snapshot):
                self._synced.set()
            if self._on_step is not None:
                self._on_step(touched)

    async def _take_snapshot(self, snapshot: Snapshot) -> None:
        """Decode in slices, then replace everything in one turn of the loop."""
        decoded = _Decoded()
        for start in range(0, len(snapshot.items), _DECODE_SLICE):
            for item in snapshot.items[start : start + _DECODE_SLICE]:
                key = parse_key(item.key)
                if key is None:
                    continue
                try:
                    decoded.add(key, item.value)
                except RecordError as error:
                    self._skip(error)
            await asyncio.sleep(0)
        consumer = self._consumer
        consumer.replace_configs(decoded.configs)
        consumer.replace_models(decoded.models)
        consumer.replace_vmodels(decoded.vmodels)
        consumer.replace_instances(decoded.instances)
        consumer.replace_copies(decoded.copies, snapshot.revision)
        consumer.replace_failures(decoded.failures)
        consumer.replace_last_used(decoded.last_used)
        for scores in decoded.use_scores:
            consumer.put_use_scores(scores)
        self.snapshots_total += 1

    def _take_changes(self, changes: Changes) -> frozenset[str]:
        touched: set[str] = set()
        for event in changes.events:
            self.events_total += 1
            key = parse_key(event.key)
            if key is None:
                continue
            if key.family in (Family.MODEL, Family.COPY, Family.FAILURE):
                touched.add(key.name)
            try:
                if isinstance(event, Put):
                    touched.update(self._put(key, event))
                else:
                    self._delete(key, event.mod_revision)
            except RecordError as error:
                self._skip(error)
        return frozenset(touched)

    def _put(self, key: Key, event: Put) -> Iterable[str]:
        """Returns the models that the record names beside the one in its key."""
        consumer, value = self._consumer, event.value
        match key.family:
            case Family.MODEL:
                consumer.put_model(decode_model(key.name, value))
            case Family.VMODEL:
                vmodel = decode_vmodel(key.name, value)
                consumer.put_vmodel(vmodel)
                return (vmodel.active_model_id, vmodel.target_model_id)
            case Family.INSTANCE:
                consumer.put_instance(decode_instance(key.name, value))
            case Family.COPY:
                copy = decode_copy(key.name, key.instance_id, value)
                consumer.put_copy(copy, event.mod_revision)
            case Family.FAILURE:
                consumer.put_failure(decode_failure(key.name, key.instance_id, value))
            case Family.LAST_USED:
                uses = decode_uses(key.name, value)
                consumer.put_last_used(key.name, uses.last_used_at_ms)
                consumer.put_use_scores(uses.scores)
            case Family.CONFIG:
                consumer.put_config(key.name, decode_config(key.name, value))
            case Family.LEADER:
                pass
        return ()

    def _delete(self, key: Key, mod_revision: int) -> None:
        consumer = self._consumer
        match key.family:
            case Family.MODEL:
                consumer.delete_model(key.name)
            case Family.VMODEL:
                consumer.delete_vmodel(key.name)
            case Family.INSTANCE:
                consumer.delete_instance(key.name)
            case Family.COPY:
                consumer.delete_copy(key.name, key.instance_id, mod_revision)
            case Family.FAILURE:
                consumer.delete_failure(key.name, key.instance_id)
            case Family.LAST_USED:
                consumer.delete_last_used(key.name)
            case Family.CONFIG:
                consumer.delete_config(key.name)
            case Family.LEADER:
                pass

    def _skip(self, error: RecordError) -> None:
        self.undecodable_total += 1
        if self.undecodable_total <= _MAX_LOGGED:
            logger.warning("a record in the store is skipped: %s", error)
        if self.undecodable_total == _MAX_LOGGED:
            logger.warning("further records that are skipped are counted and not logged")
