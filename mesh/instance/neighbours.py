"""What this instance knows of the others, and what it asks of them: loads and unloads of copies.

Owns a ``ClusterView`` that watches of ``instances/`` and ``config/`` keep: a few hundred bytes an
instance, and an event for each notable change of one. Copies and failures are not watched (a mesh
has a hundred thousand of them); ``read_copies`` reads those of one model when a decision about it
is due, and the view remembers the last ``MODELS_REMEMBERED`` of them. Whatever else the view could
hold is empty: decisions take the model's record from their caller.

A connection is made when something is asked and closed when its instance has gone, or was asked
nothing for ``IDLE_S``. Nothing here decides. While the store is away the view stays what it was and
``read_copies`` raises; an instance that cannot be reached answers False, with the reason logged.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from typing import Final

from mesh import registry
from mesh.core.errors import MeshError, Unavailable
from mesh.core.policy import Policy
from mesh.core.types import CopyRecord, FailureRecord, InstanceRecord, LoadPriority, ModelRecord
from mesh.core.view import ClusterView
from mesh.instance.clock import Clock
from mesh.internal_calls import (
    LOAD_PATH,
    UNLOAD_PATH,
    UNLOAD_TIMEOUT_S,
    load_request,
    load_timeout_ms,
)
from mesh.store.api import Changes, Delete, KeyValue, KVStore, Put, Snapshot
from mesh.wire.client import Channel
from protos import mesh_internal_pb2 as internal

log = logging.getLogger(__name__)

# Models whose copies the view still holds after they were read: those being decided about now.
MODELS_REMEMBERED: Final = 256
# A connection to another instance is closed when it was not used for so long.
IDLE_S: Final = 60.0

# (last use in Unix milliseconds, score) of a model as this instance knows it.
UseOf = Callable[[str], tuple[int, float]]


class _Line:
    """One connection and when it was used last."""

    __slots__ = ("calls", "channel", "used_at_s")

    def __init__(self, channel: Channel, now_s: float) -> None:
        self.channel = channel
        self.used_at_s = now_s
        self.calls = 0


class Neighbours:
    """``run`` has to run. ``use_of`` tells what goes along with a load of how a model was used;
    ``on_config`` is called when ``view.config`` has been read."""

    def __init__(
        self,
        instance_id: str,
        store: KVStore,
        policy: Policy,
        clock: Clock,
        *,
        use_of: UseOf = lambda model_id: (0, 0.0),
        on_config: Callable[[], None] = lambda: None,
        make_channel: Callable[[str], Channel] = Channel,
    ) -> None:
        self.instance_id = instance_id
        self.view = ClusterView()
        self.synced = asyncio.Event()  # the instances are known
        self._store = store
        self._policy = policy
        self._clock = clock
        self._use_of = use_of
        self.on_config = on_config
        self._make_channel = make_channel
        self._lines: dict[str, _Line] = {}
        self._read_at: dict[str, int] = {}  # model id -> revision as of which its copies are known

    def use_policy(self, policy: Policy) -> None:
        self._policy = policy

    # ---- the view -----------------------------------------------------------------------------

    async def run(self) -> None:
        """Until the store is closed or the task cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._follow_instances())
            group.create_task(self._follow_config())
            group.create_task(self._close_idle())

    async def _follow_instances(self) -> None:
        async for step in self._store.watch(registry.INSTANCES_PREFIX):
            match step:
                case Snapshot(items):
                    found = [record for item in items if (record := _instance(item)) is not None]
                    present = {record.instance_id for record in found}
                    for instance_id in [i for i in self.view.instances if i not in present]:
                        self._instance_gone(instance_id)
                    self.view.replace_instances(found)
                case Changes(events):
                    for event in events:
                        self._instance_event(event)
            self.synced.set()
            self._close_gone()

    def _instance_event(self, event: Put | Delete) -> None:
        if isinstance(event, Put):
            record = _instance(event)
            if record is not None:
                self.view.put_instance(record)
            return
        key = registry.parse_key(event.key)
        if key is not None:
            self._instance_gone(key.name)

    def _instance_gone(self, instance_id: str) -> None:
        """With what was read of its copies: no event would tell of their end."""
        slot = self.view.instances.get(instance_id)
        for model_id in list(slot.copies) if slot is not None else ():
            self.view.delete_copy(model_id, instance_id)
        self.view.delete_instance(instance_id)

    async def _follow_config(self) -> None:
        async for step in self._store.watch(registry.CONFIG_PREFIX):
            match step:
                case Snapshot(items):
                    read = [_config(item) for item in items]
                    self.view.replace_configs(dict(found for found in read if found is not None))
                case Changes(events):
                    for event in events:
                        self._config_event(event)
            self.on_config()

    def _config_event(self, event: Put | Delete) -> None:
        if isinstance(event, Put):
            found = _config(event)
            if found is not None:
                self.view.put_config(*found)
            return
        key = registry.parse_key(event.key)
        if key is not None:
            self.view.delete_config(key.name)

    async def read_copies(self, model_id: str) -> ClusterView:
        """The view, with the copies and failures of this model as they stand in the store now.

        Raises StoreUnavailable.
        """
        copies, failures = await asyncio.gather(
            self._store.range(registry.copies_prefix(model_id)),
            self._store.range(registry.failures_prefix(model_id)),
        )
        self._take_copies(model_id, copies)
        self._take_failures(model_id, failures)
        self._remember(model_id, copies.revision)
        return self.view

    def _remember(self, model_id: str, revision: int) -> None:
        self._read_at.pop(model_id, None)
        self._read_at[model_id] = revision
        while len(self._read_at) > MODELS_REMEMBERED:
            self._forget(next(iter(self._read_at)))

    def _take_copies(self, model_id: str, snapshot: Snapshot) -> None:
        view = self.view
        known = {copy.instance_id for copy in view.copies_of(model_id)}
        for item in snapshot.items:
            try:
                record = registry.decode(item.key, item.value)
            except registry.RecordError as error:
                log.warning("a copy's record is skipped: %s", error)
                continue
            # On an instance that is not known (yet) it is no copy to count with.
            if isinstance(record, CopyRecord) and record.instance_id in view.instances:
                known.discard(record.instance_id)
                view.put_copy(record, item.mod_revision)
        for instance_id in known:
            view.delete_copy(model_id, instance_id, snapshot.revision)

    def _take_failures(self, model_id: str, snapshot: Snapshot) -> None:
        view = self.view
        for failure in view.failures_of(model_id, 0):
            view.delete_failure(model_id, failure.instance_id)
        for item in snapshot.items:
            try:
                record = registry.decode(item.key, item.value)
            except registry.RecordError as error:
                log.warning("a failure's record is skipped: %s", error)
                continue
            if isinstance(record, FailureRecord):
                view.put_failure(record)

    def _forget(self, model_id: str) -> None:
        """Its copies are not watched: what is known of them grows old."""
        del self._read_at[model_id]
        for copy in self.view.copies_of(model_id):
            self.view.delete_copy(model_id, copy.instance_id)
        for failure in self.view.failures_of(model_id, 0):
            self.view.delete_failure(model_id, failure.instance_id)

    # ---- what is asked of others --------------------------------------------------------------

    async def load_on(
        self,
        instance_id: str,
        record: ModelRecord,
        *,
        priority: LoadPriority,
        reason: str,
        size_bytes: int,
        pin: bool = False,
    ) -> bool:
        """Have ``record`` loaded there; whether it is. Counted as pending in the view meanwhile.

        The claim is made as of the last ``read_copies`` of the model: call that first.
        """
        model_id, view, now_ms = record.model_id, self.view, self._clock.now_ms()
        last_used_at_ms, use_score = self._use_of(model_id)
        request = load_request(
            model_id,
            record,
            revision=self._read_at.get(model_id, 0),
            last_used_at_ms=last_used_at_ms,
            priority=priority,
            pin=pin,
            use_score=use_score,
            reason=reason,
        )
        timeout_s = load_timeout_ms(record, self._policy) / 1_000
        view.add_pending(model_id, instance_id, size_bytes=size_bytes, now_ms=now_ms)
        try:
            message = await self._call(instance_id, LOAD_PATH, request, timeout_s)
            answer = internal.LoadResponse.FromString(message)
        except (MeshError, ValueError) as error:  # protobuf's DecodeError is a ValueError
            log.info("load of %s on %s (%s): %s", model_id, instance_id, reason, error)
            return False
        finally:
            view.drop_pending(model_id, instance_id)
        loaded = bool(answer.outcome == internal.LoadResponse.LOADED)
        outcome = internal.LoadResponse.Outcome.Name(answer.outcome)
        log.info("load of %s on %s (%s): %s %s", model_id, instance_id, reason, outcome,
                 answer.message)  # fmt: skip
        if loaded:
            view.mark_loaded(
                model_id,
                instance_id,
                size_bytes=answer.size_bytes,
                copy_revision=answer.copy_revision,
                now_ms=self._clock.now_ms(),
            )
            self._remember(model_id, self._read_at.get(model_id, 0))
        return loaded

    async def unload_on(self, instance_id: str, model_id: str, reason: str) -> bool:
        """Have the copy there dropped once its requests have ended; whether there was one."""
        request = internal.UnloadRequest(model_id=model_id, reason=reason)
        try:
            message = await self._call(
                instance_id, UNLOAD_PATH, request.SerializeToString(), UNLOAD_TIMEOUT_S
            )
            was_here = bool(internal.UnloadResponse.FromString(message).was_here)
        except (MeshError, ValueError) as error:
            log.info("unload of %s on %s (%s): %s", model_id, instance_id, reason, error)
            return False
        self.view.delete_copy(model_id, instance_id)
        return was_here

    # ---- connections --------------------------------------------------------------------------

    async def _call(self, instance_id: str, path: str, message: bytes, timeout_s: float) -> bytes:
        line = self._line(instance_id)
        line.calls += 1
        try:
            reply = await line.channel.unary(path, message, timeout_s=timeout_s)
        finally:
            line.calls -= 1
            line.used_at_s = asyncio.get_running_loop().time()
        return reply.message

    def _line(self, instance_id: str) -> _Line:
        line = self._lines.get(instance_id)
        if line is None:
            slot = self.view.instances.get(instance_id)
            if slot is None:
                raise Unavailable(f"instance {instance_id!r} is not there (any more)")
            now_s = asyncio.get_running_loop().time()
            line = _Line(self._make_channel(slot.record.address), now_s)
            self._lines[instance_id] = line
        return line

    def _close_gone(self) -> None:
        for instance_id in [i for i in self._lines if i not in self.view.instances]:
            if not self._lines[instance_id].calls:  # else when it is idle: it may only have lost
                self._lines.pop(instance_id).channel.peer.abort()  # its lease

    async def _close_idle(self) -> None:
        while True:
            await asyncio.sleep(IDLE_S / 2)
            now_s = asyncio.get_running_loop().time()
            for instance_id, line in list(self._lines.items()):
                if not line.calls and now_s - line.used_at_s >= IDLE_S:
                    await self._lines.pop(instance_id).channel.close()

    async def close(self) -> None:
        while self._lines:
            _, line = self._lines.popitem()
            await line.channel.close()


def _instance(item: KeyValue | Put) -> InstanceRecord | None:
    """None for a value that cannot be read: one bad record must not blind us to the others."""
    try:
        record = registry.decode(item.key, item.value)
    except registry.RecordError as error:
        log.warning("an instance's record is skipped: %s", error)
        return None
    return record if isinstance(record, InstanceRecord) else None


def _config(item: KeyValue | Put) -> tuple[str, dict[str, object]] | None:
    """None for a value that makes no sense: the last good one stays."""
    key = registry.parse_key(item.key)
    if key is None:
        return None
    try:
        return key.name, registry.decode_config(key.name, item.value)
    except registry.RecordError as error:
        log.error("a live setting is not acted on: %s", error)
        return None
