"""``ClusterView``: everything a router knows of the mesh, in memory, fed by watches.

It owns the indexes (copies by model and by instance, aliases by model, the table of routable
copies) and this router's own overlays (placements that it has asked for and loads that it has
seen end, before the store tells of them). It decides nothing: placement, routing, transitions and
repair are functions over it. It does no I/O and has no clock.

One thread writes and reads it (the event loop of a router); nothing is locked. Every mutator is
idempotent and tolerates events in any order between families: a copy may arrive before its
instance (it is not routable until the instance is known), an instance may go before its copies'
keys do (they stop being routable at once). It fails in no way of its own: what is missing is
simply not there.

Sizes: meant for 100,000 models and 1,000 instances. Each mutator is O(1) or O(copies touched);
nothing here walks all models.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from dataclasses import replace
from typing import Final

from mesh.core.aliases import Aliases
from mesh.core.failure_index import FailureIndex
from mesh.core.live_config import LiveConfig, PodRuntime
from mesh.core.replacement import ReplicaSets
from mesh.core.resolving import Resolved, Unresolved, resolve
from mesh.core.slots import InstanceSlot, PendingLoad
from mesh.core.types import (
    CopyRecord,
    CopyState,
    FailureRecord,
    InstanceRecord,
    InstanceState,
    ModelRecord,
    TypeConstraint,
    VModelRecord,
)
from mesh.core.uses_told import UsesTold

__all__ = ["FAMILIES", "ClusterView", "Resolved", "Unresolved"]

FAMILIES: Final = frozenset({"models", "vmodels", "instances", "copies", "failures"})


class ClusterView:
    """See the module's docstring. ``models``, ``vmodels`` and ``instances`` are for reading."""

    def __init__(self) -> None:
        self.models: dict[str, ModelRecord] = {}
        self.vmodels: dict[str, VModelRecord] = {}
        self.instances: dict[str, InstanceSlot] = {}
        # Generations of each group of instances: which are about to be replaced.
        self.replicas = ReplicaSets()
        # Store revision up to which the copies are known: what a Load request carries.
        self.revision = 0
        # Grows whenever a name may resolve or route differently: the key of a router's hot table.
        self.routes_epoch = 0
        self._copies: dict[str, dict[str, CopyRecord]] = {}  # model id -> instance id -> record
        self._absent: dict[str, dict[str, CopyRecord]] = {}  # instance without a record -> copies
        self._loaded: dict[str, tuple[str, ...]] = {}  # model id -> routable instances, sorted
        self._failures = FailureIndex()
        self._aliases = Aliases()
        self._unaliased: set[str] = set()  # auto_delete models that no alias names
        self._wanting: set[str] = set()  # models with a minimum number of copies
        self._pending_on: dict[str, tuple[str, ...]] = {}  # model id -> instances asked, sorted
        self._marks: dict[tuple[str, str], int] = {}  # locally known LOADED -> claim's revision
        self._uses = UsesTold()
        self._seen: set[str] = set()
        # Live settings, as they stand in the store.
        self._settings = LiveConfig()

    # ---- models ---------------------------------------------------------------------------

    def put_model(self, record: ModelRecord) -> None:
        model_id = record.model_id
        if model_id not in self.models:
            self.routes_epoch += 1
        self.models[model_id] = record
        self._uses.tell(model_id, record.last_used_at_ms)
        _keep(self._wanting, model_id, record.pinned or record.min_copies > 1)
        _keep(self._unaliased, model_id, record.auto_delete and not self._aliases.of(model_id))

    def delete_model(self, model_id: str) -> None:
        """Unregister. Copies and failures go by their own events."""
        if self.models.pop(model_id, None) is not None:
            self.routes_epoch += 1
        self._wanting.discard(model_id)
        self._unaliased.discard(model_id)
        self._uses.forget(model_id)

    def replace_models(self, records: Iterable[ModelRecord]) -> None:
        """A snapshot: what it does not hold is gone."""
        self._seen.add("models")
        fresh = {record.model_id: record for record in records}
        for model_id in [known for known in self.models if known not in fresh]:
            self.delete_model(model_id)
        for record in fresh.values():
            self.put_model(record)

    # ---- uses -----------------------------------------------------------------------------

    def put_last_used(self, instance_id: str, last_used_at_ms: Mapping[str, int]) -> None:
        """Merge one instance's flushed blob; the latest instant wins."""
        self._uses.put_blob(instance_id, max(last_used_at_ms.values(), default=0))
        for model_id, at_ms in last_used_at_ms.items():
            if model_id in self.models:
                self._uses.tell(model_id, at_ms)

    def delete_last_used(self, instance_id: str) -> None:
        """The blob is gone; what it told is kept."""
        self._uses.delete_blob(instance_id)

    def replace_last_used(self, blobs: Mapping[str, Mapping[str, int]]) -> None:
        self._uses.clear_blobs()
        for instance_id, blob in blobs.items():
            self.put_last_used(instance_id, blob)

    def put_use_scores(self, scores: Mapping[str, float]) -> None:
        """Merge what one blob tells of how much models are used; the largest wins."""
        for model_id, score in scores.items():
            if model_id in self.models:
                self._uses.tell_score(model_id, score)

    def flushed_by_the_gone(self) -> Iterator[tuple[str, int]]:
        """(instance that is not there, the latest use in the blob that it left behind)."""
        return (item for item in self._uses.blobs() if item[0] not in self.instances)

    @property
    def last_used(self) -> Mapping[str, int]:
        """Last uses that the store told of, by model id; models never used are absent."""
        return self._uses.last_used

    def last_used_at_ms(self, model_id: str) -> int:
        """The latest use that the store told of; 0 when never."""
        return self._uses.last_used.get(model_id, 0)

    def use_score(self, model_id: str) -> float:
        """How much it is used (``mesh.core.usage``), the largest told; 0.0 when unknown."""
        return self._uses.score(model_id)

    # ---- live settings --------------------------------------------------------------------

    @property
    def config(self) -> Mapping[str, Mapping[str, object]]:
        """By name, as they stand in the store; what they mean is their readers'."""
        return self._settings.by_name

    @property
    def type_constraints(self) -> Mapping[str, TypeConstraint]:
        """By format; ``_default`` is for those that are not named."""
        return self._settings.type_constraints

    def constraint_of(self, model_type: str) -> TypeConstraint | None:
        """What instances must and should have to run that format."""
        return self._settings.constraint_of(model_type)

    def runtime_for(self, model_type: str, required: Collection[str]) -> PodRuntime | None:
        """A runtime that could serve the format, with all the labels, if it had pods."""
        return self._settings.runtime_for(model_type, required)

    def put_config(self, name: str, value: Mapping[str, object]) -> None:
        """Raises InvalidArgument for what makes no sense; nothing changes then."""
        self._settings.put(name, value)

    def delete_config(self, name: str) -> None:
        self._settings.delete(name)

    def replace_configs(self, values: Mapping[str, Mapping[str, object]]) -> None:
        self._settings.replace(values)

    # ---- vmodels --------------------------------------------------------------------------

    def put_vmodel(self, record: VModelRecord) -> None:
        before = self.vmodels.get(record.name)
        self.vmodels[record.name] = record
        renamed = self._aliases.put(record, before)
        if renamed or before is None or before.active_model_id != record.active_model_id:
            self.routes_epoch += 1
        self._judge_unaliased(renamed)

    def delete_vmodel(self, name: str) -> None:
        record = self.vmodels.pop(name, None)
        if record is not None:
            self.routes_epoch += 1
            self._judge_unaliased(self._aliases.delete(record))

    def replace_vmodels(self, records: Iterable[VModelRecord]) -> None:
        self._seen.add("vmodels")
        fresh = {record.name: record for record in records}
        for name in [known for known in self.vmodels if known not in fresh]:
            self.delete_vmodel(name)
        for record in fresh.values():
            self.put_vmodel(record)

    def _judge_unaliased(self, model_ids: Iterable[str]) -> None:
        for model_id in model_ids:
            model = self.models.get(model_id)
            orphan = model is not None and model.auto_delete and not self._aliases.of(model_id)
            _keep(self._unaliased, model_id, orphan)

    # ---- instances ------------------------------------------------------------------------

    def put_instance(self, record: InstanceRecord) -> None:
        instance_id = record.instance_id
        slot = self.instances.get(instance_id)
        if slot is None:
            slot = self.instances[instance_id] = InstanceSlot(record)
            self.replicas.put(record, None)
            for copy in self._absent.pop(instance_id, {}).values():
                slot.add_copy(copy)
            self._refresh_routes(slot)
            return
        before = slot.record
        slot.put_record(record)
        self.replicas.put(record, before)
        if record.state is not before.state:
            self._refresh_routes(slot)

    def delete_instance(self, instance_id: str) -> None:
        """Its copies stop being routable at once; their own keys' events follow."""
        slot = self.instances.pop(instance_id, None)
        if slot is None:
            return
        self.replicas.remove(slot.record)
        for model_id in tuple(slot.pending):
            self._end_pending(slot, model_id)
        if slot.copies:
            self._absent[instance_id] = slot.copies
        self._refresh_routes(slot)

    def replace_instances(self, records: Iterable[InstanceRecord]) -> None:
        self._seen.add("instances")
        fresh = {record.instance_id: record for record in records}
        for instance_id in [known for known in self.instances if known not in fresh]:
            self.delete_instance(instance_id)
        for record in fresh.values():
            self.put_instance(record)

    # ---- copies ---------------------------------------------------------------------------

    def put_copy(self, record: CopyRecord, mod_revision: int = 0) -> None:
        """``mod_revision`` is the event's. A claim that this router already knows to have become
        LOADED (``mark_loaded``) does not take the copy back to LOADING."""
        key = (record.model_id, record.instance_id)
        mark = self._marks.get(key)
        if mark is not None:
            if record.state is CopyState.LOADING and 0 < mod_revision <= mark:
                record = replace(record, state=CopyState.LOADED)
            else:
                del self._marks[key]
        self._store_copy(record)

    def delete_copy(self, model_id: str, instance_id: str, mod_revision: int = 0) -> None:
        """Also for a copy that answered ``not-here``. An event older than what ``mark_loaded``
        told is of an earlier copy and changes nothing."""
        key = (model_id, instance_id)
        if 0 < mod_revision < self._marks.get(key, 0):
            return
        self._marks.pop(key, None)
        self._drop_copy(model_id, instance_id)

    def replace_copies(self, records: Iterable[CopyRecord], revision: int = 0) -> None:
        """A snapshot as of ``revision``; copies marked LOADED by later claims stay."""
        self._seen.add("copies")
        fresh = {(r.model_id, r.instance_id): r for r in records}
        self._marks = {k: mark for k, mark in self._marks.items() if mark > revision > 0}
        known = [(m, i) for m, by_instance in self._copies.items() for i in by_instance]
        for model_id, instance_id in known:
            if (model_id, instance_id) not in fresh and (model_id, instance_id) not in self._marks:
                self._drop_copy(model_id, instance_id)
        for key, record in fresh.items():
            if key not in self._marks:
                self._store_copy(record)
        self.advance(revision)

    def mark_loaded(
        self, model_id: str, instance_id: str, *, size_bytes: int, copy_revision: int, now_ms: int
    ) -> None:
        """A Load answered LOADED: the copy is routable before the store says so."""
        known = self._copies.get(model_id, {}).get(instance_id)
        base = known or CopyRecord(model_id, instance_id, CopyState.LOADED, claimed_at_ms=now_ms)
        if copy_revision > 0:
            self._marks[(model_id, instance_id)] = copy_revision
        loaded_at_ms = base.loaded_at_ms or now_ms
        self._store_copy(
            replace(base, state=CopyState.LOADED, size_bytes=size_bytes, loaded_at_ms=loaded_at_ms)
        )

    def _store_copy(self, record: CopyRecord) -> None:
        model_id, instance_id = record.model_id, record.instance_id
        self._copies.setdefault(model_id, {})[instance_id] = record
        slot = self.instances.get(instance_id)
        if slot is None:
            self._absent.setdefault(instance_id, {})[model_id] = record
            return
        slot.add_copy(record)
        self._end_pending(slot, model_id)
        self._refresh_route(model_id)

    def _drop_copy(self, model_id: str, instance_id: str) -> None:
        by_instance = self._copies.get(model_id)
        if by_instance is None or by_instance.pop(instance_id, None) is None:
            return
        if not by_instance:
            del self._copies[model_id]
        slot = self.instances.get(instance_id)
        if slot is not None:
            slot.remove_copy(model_id)
        elif instance_id in self._absent:
            self._absent[instance_id].pop(model_id, None)
            if not self._absent[instance_id]:
                del self._absent[instance_id]
        self._refresh_route(model_id)

    def _refresh_routes(self, slot: InstanceSlot) -> None:
        for model_id in slot.copies:
            self._refresh_route(model_id)

    def _refresh_route(self, model_id: str) -> None:
        routable = self._loaded_in(InstanceState.READY, model_id)
        if not routable:
            routable = self._loaded_in(InstanceState.DRAINING, model_id)
        if routable == self._loaded.get(model_id, ()):
            return
        self.routes_epoch += 1
        if routable:
            self._loaded[model_id] = routable
        else:
            del self._loaded[model_id]

    def _loaded_in(self, state: InstanceState, model_id: str) -> tuple[str, ...]:
        instances = self.instances
        found = [
            instance_id
            for instance_id, copy in self._copies.get(model_id, {}).items()
            if copy.state is CopyState.LOADED
            and (slot := instances.get(instance_id)) is not None
            and slot.record.state is state
        ]
        return tuple(sorted(found))

    # ---- failures -------------------------------------------------------------------------

    def put_failure(self, record: FailureRecord) -> None:
        self._failures.put(record)

    def delete_failure(self, model_id: str, instance_id: str) -> None:
        self._failures.delete(model_id, instance_id)

    def replace_failures(self, records: Iterable[FailureRecord]) -> None:
        self._seen.add("failures")
        self._failures = FailureIndex()
        for record in records:
            self._failures.put(record)

    def failures_of(self, model_id: str, now_ms: int) -> tuple[FailureRecord, ...]:
        """Unexpired failures, the latest first."""
        return self._failures.of(model_id, now_ms)

    def all_failures(self) -> Iterator[FailureRecord]:
        """Every failure record, expired ones too."""
        return self._failures.all()

    # ---- this router's pending placements -------------------------------------------------

    def add_pending(self, model_id: str, instance_id: str, *, size_bytes: int, now_ms: int) -> None:
        """Count a load that is about to be asked for. It ends when the copy is seen, with
        ``drop_pending`` (the load failed or was refused) or with ``expire_pending``."""
        slot = self.instances.get(instance_id)
        if slot is None or model_id in slot.copies:
            return
        slot.add_pending(model_id, PendingLoad(size_bytes, now_ms))
        asked = self._pending_on.get(model_id, ())
        if instance_id not in asked:
            self._pending_on[model_id] = tuple(sorted((*asked, instance_id)))

    def drop_pending(self, model_id: str, instance_id: str) -> None:
        slot = self.instances.get(instance_id)
        if slot is not None:
            self._end_pending(slot, model_id)

    def expire_pending(self, asked_before_ms: int) -> int:
        """Forget pending loads asked for earlier than that; returns how many."""
        expired = [
            (slot, model_id)
            for slot in self.instances.values()
            for model_id, pending in slot.pending.items()
            if pending.asked_at_ms < asked_before_ms
        ]
        for slot, model_id in expired:
            self._end_pending(slot, model_id)
        return len(expired)

    def _end_pending(self, slot: InstanceSlot, model_id: str) -> None:
        if not slot.remove_pending(model_id):
            return
        left = tuple(i for i in self._pending_on[model_id] if i != slot.record.instance_id)
        if left:
            self._pending_on[model_id] = left
        else:
            del self._pending_on[model_id]

    # ---- reading --------------------------------------------------------------------------

    @property
    def capacity_bytes(self) -> int:
        """Of all READY instances. Walks the instances: for sweeps, not for requests."""
        return sum(s.record.capacity_bytes for s in self.instances.values() if s.ready)

    @property
    def free_bytes(self) -> int:
        """Of all READY instances, as placement counts it. Walks the instances."""
        return sum(s.effective_free_bytes for s in self.instances.values() if s.ready)

    @property
    def synced(self) -> bool:
        """A first snapshot of every family has come: before that, absence means nothing."""
        return self._seen >= FAMILIES

    def advance(self, revision: int) -> None:
        self.revision = max(self.revision, revision)

    def resolve(self, name: str) -> Resolved | Unresolved:
        """An alias of that name first, then a model of that id."""
        return resolve(name, self.models, self.vmodels)

    def loaded_on(self, model_id: str) -> tuple[str, ...]:
        """Ids of READY instances with a LOADED copy, sorted; when there is none, of DRAINING ones,
        which serve until they leave. One look-up: the hit path."""
        return self._loaded.get(model_id, ())

    def lasting_on(self, model_id: str) -> tuple[str, ...]:
        """Of ``loaded_on`` those that are not about to leave: READY instances."""
        return tuple(i for i in self._loaded.get(model_id, ()) if self.instances[i].ready)

    def copies_of(self, model_id: str) -> tuple[CopyRecord, ...]:
        """Copies on instances that exist, by instance id."""
        by_instance = self._copies.get(model_id)
        if not by_instance:
            return ()
        return tuple(by_instance[i] for i in sorted(by_instance) if i in self.instances)

    def copy(self, model_id: str, instance_id: str) -> CopyRecord | None:
        """The copy, when its instance exists."""
        slot = self.instances.get(instance_id)
        return slot.copies.get(model_id) if slot is not None else None

    def all_copies(self) -> Iterator[CopyRecord]:
        """Every copy on an instance that exists."""
        for slot in self.instances.values():
            yield from slot.copies.values()

    def copies_without_instance(self) -> Mapping[str, Mapping[str, CopyRecord]]:
        """By the id of an instance that has no record, and by model."""
        return self._absent

    def copied_models(self) -> Iterable[str]:
        """Ids of models with a copy somewhere, registered or not."""
        return self._copies.keys()

    def aliases_of(self, model_id: str) -> tuple[str, ...]:
        """Names whose active or target model this is."""
        return self._aliases.of(model_id)

    def vmodels_in_transition(self) -> Iterable[str]:
        """Names whose target is not yet what answers."""
        return self._aliases.moving

    def unaliased_models(self) -> Iterable[str]:
        """Ids of ``auto_delete`` models that no alias names."""
        return self._unaliased

    def models_with_minimum(self) -> AbstractSet[str]:
        """Ids of models that are pinned or want two or more copies."""
        return self._wanting

    def pending_of(self, model_id: str) -> tuple[str, ...]:
        """Instances that this router has asked to load the model, not yet seen in the view."""
        return self._pending_on.get(model_id, ())

    def __repr__(self) -> str:
        return (
            f"ClusterView(models={len(self.models)} vmodels={len(self.vmodels)} "
            f"instances={len(self.instances)} loaded={len(self._loaded)} "
            f"revision={self.revision} synced={self.synced})"
        )


def _keep(ids: set[str], model_id: str, wanted: bool) -> None:
    if wanted:
        ids.add(model_id)
    else:
        ids.discard(model_id)
