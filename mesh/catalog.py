"""What is registered: the writes of models and aliases, each one transaction that compares.

Every write reads the present state from the store (not from the view, which lags), decides, and
writes only if nothing it looked at has changed meanwhile; then it tells the view, so that whoever
wrote through this router reads what was written. After ``MAX_TRIES`` lost races it fails with
UNAVAILABLE. While the store is away every write fails with UNAVAILABLE and says so.

Nothing is loaded or unloaded here.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
from typing import Final, Generic, Literal, TypeVar

from mesh import registry
from mesh.core.errors import AlreadyExists, FailedPrecondition, Unavailable
from mesh.core.types import ModelRecord, VModelRecord
from mesh.core.view import ClusterView
from mesh.manifest import AppliedModel
from mesh.store.api import (
    Condition,
    Delete,
    KeyAbsent,
    KVStore,
    ModRevisionIs,
    Operation,
    Put,
    StoreUnavailable,
)

# Two people who write one name at the same moment: the second try sees what the first one wrote.
MAX_TRIES: Final = 5
RETRY_MS: Final = 200
# Operations of one transaction: etcd takes 128.
_BATCH: Final = 100

R = TypeVar("R")
Action = Literal["created", "configured", "unchanged"]

# What of a model may change without it being another model.
_SCALING: Final = (
    "size_bytes_stated",
    "min_copies",
    "pinned",
    "max_concurrency",
    "max_batch_size",
    "max_batch_latency_ms",
    "load_timeout_ms",
    "idle_unload_ms",
    "required_labels",
    "preferred_labels",
    "labels",
)


@dataclass(frozen=True, slots=True)
class Stored(Generic[R]):
    """A record with the revision that a compare-and-swap needs; None where there is none."""

    record: R | None
    mod_revision: int

    def unchanged(self, key: str) -> Condition:
        return ModRevisionIs(key, self.mod_revision) if self.mod_revision else KeyAbsent(key)


class Catalog:
    """``now_ms`` is the wall clock's reading."""

    def __init__(self, store: KVStore, view: ClusterView, *, now_ms: Callable[[], int]) -> None:
        self._store = store
        self._view = view
        self._now_ms = now_ms

    async def model(self, model_id: str) -> Stored[ModelRecord]:
        found = await self._store.get(registry.model_key(model_id))
        if found is None:
            return Stored(None, 0)
        return Stored(registry.decode_model(model_id, found.value), found.mod_revision)

    async def alias(self, name: str) -> Stored[VModelRecord]:
        found = await self._store.get(registry.vmodel_key(name))
        if found is None:
            return Stored(None, 0)
        return Stored(registry.decode_vmodel(name, found.value), found.mod_revision)

    # ---- directly registered models -----------------------------------------------------------

    async def register(self, record: ModelRecord) -> Action:
        """Register a model. Idempotent; AlreadyExists when its type, key or path differ."""
        model_id = record.model_id
        key = registry.model_key(model_id)
        for _ in range(MAX_TRIES):
            there = await self.model(model_id)
            if there.record is not None:
                self._view.put_model(there.record)
                if _source(there.record) != _source(record):
                    raise AlreadyExists(
                        f"model {model_id!r}: Model already exists with different attribute values"
                    )
                return "unchanged"
            alias_key = registry.vmodel_key(model_id)
            if await self._store.get(alias_key) is not None:
                raise AlreadyExists(f"{model_id!r} is the name of an alias: choose another id")
            done = await self._store.txn(
                [KeyAbsent(key), KeyAbsent(alias_key)], [Put(key, registry.encode(record))]
            )
            if done.succeeded:
                self._view.put_model(record)
                return "created"
        raise contended(model_id)

    async def unregister(self, model_id: str) -> bool:
        """Remove a model; whether it was there. FailedPrecondition while an alias names it."""
        key = registry.model_key(model_id)
        for _ in range(MAX_TRIES):
            there = await self.model(model_id)
            if there.record is None:
                self._view.delete_model(model_id)
                return False
            if names := await self._names_of(model_id):
                raise FailedPrecondition(
                    f"model {model_id!r} is referenced by {', '.join(map(repr, names))}: "
                    "delete that first"
                )
            done = await self._store.txn([there.unchanged(key)], _removal(model_id))
            if done.succeeded:
                self._view.delete_model(model_id)
                return True
        raise contended(model_id)

    async def _names_of(self, model_id: str) -> list[str]:
        """Aliases that name the model now. The view proposes, the store confirms."""
        named: list[str] = []
        for name in self._view.aliases_of(model_id):
            alias = (await self.alias(name)).record
            if alias is not None and model_id in (alias.active_model_id, alias.target_model_id):
                named.append(name)
        return named

    # ---- resources ----------------------------------------------------------------------------

    async def apply(self, applied: AppliedModel) -> Action:
        """Write the model and the alias of a resource in one transaction.

        An alias that is there already keeps its active model: only its target moves, and the
        leader switches when that has loaded. Raises AlreadyExists for a name that is somebody
        else's.
        """
        name, model = applied.name, applied.model
        alias_key = registry.vmodel_key(name)
        model_key = registry.model_key(model.model_id)
        for _ in range(MAX_TRIES):
            alias = await self.alias(name)
            known = await self.model(model.model_id)
            new_alias = self._moved(alias.record, applied.alias)
            new_model = _merged(known.record, model)
            if new_alias == alias.record and new_model == known.record:
                return "unchanged"
            conditions = [alias.unchanged(alias_key), known.unchanged(model_key)]
            if alias.record is None and name != model.model_id:
                conditions.append(KeyAbsent(registry.model_key(name)))
                if (await self.model(name)).record is not None:
                    raise AlreadyExists(
                        f"{name!r} is the id of a directly registered model: unregister it first"
                    )
            # The model is written even when it is the same: whoever is about to delete it because
            # nothing named it loses the race.
            operations: list[Operation] = [
                Put(alias_key, registry.encode(new_alias)),
                Put(model_key, registry.encode(new_model)),
            ]
            done = await self._store.txn(conditions, operations)
            if done.succeeded:
                self._view.put_model(new_model)
                self._view.put_vmodel(new_alias)
                return "created" if alias.record is None else "configured"
        raise contended(name)

    def _moved(self, old: VModelRecord | None, wanted: VModelRecord) -> VModelRecord:
        if old is None:
            return wanted
        if old.owner != wanted.owner:
            raise AlreadyExists(
                f"{wanted.name!r} belongs to {old.owner or 'nobody known'!r} and not to "
                f"{wanted.owner!r}: delete it first"
            )
        if old.target_model_id == wanted.target_model_id and old.manifest == wanted.manifest:
            return old
        same_target = old.target_model_id == wanted.target_model_id
        return replace(
            old,
            target_model_id=wanted.target_model_id,
            manifest=wanted.manifest,
            failed=old.failed if same_target else "",
            updated_at_ms=self._now_ms(),
        )

    async def delete(self, name: str, *, owner: str | None = None) -> tuple[bool, tuple[str, ...]]:
        """Delete an alias with its own models, or a directly registered model.

        Returns whether the name existed, and the ids of the models that went. Models that another
        alias names, and models that were registered by themselves, stay when an alias goes. With
        ``owner`` nothing goes but an alias of that owner.
        """
        alias_key = registry.vmodel_key(name)
        for _ in range(MAX_TRIES):
            alias = await self.alias(name)
            if owner is not None and (alias.record is None or alias.record.owner != owner):
                return False, ()
            if alias.record is None:
                existed = await self.unregister(name)
                return existed, ((name,) if existed else ())
            conditions: list[Condition] = [alias.unchanged(alias_key)]
            operations: list[Operation] = [Delete(alias_key)]
            gone: list[str] = []
            for model_id in {alias.record.active_model_id, alias.record.target_model_id}:
                model = await self.model(model_id)
                others = [n for n in await self._names_of(model_id) if n != name]
                if model.record is None or not model.record.auto_delete or others:
                    continue
                conditions.append(model.unchanged(registry.model_key(model_id)))
                operations.extend(_removal(model_id))
                gone.append(model_id)
            done = await self._store.txn(conditions, operations)
            if done.succeeded:
                self._view.delete_vmodel(name)
                for model_id in gone:
                    self._view.delete_model(model_id)
                return True, tuple(sorted(gone))
        raise contended(name)

    # ---- the leader's writes ------------------------------------------------------------------

    async def replace_alias(
        self, old: VModelRecord, new: VModelRecord, delete_model_id: str | None = None
    ) -> bool:
        """Write ``new`` where ``old`` still stands, and delete a model with it; whether it was."""
        key = registry.vmodel_key(new.name)
        there = await self.alias(new.name)
        if there.record != old:
            return False
        operations: list[Operation] = [Put(key, registry.encode(new))]
        conditions = [there.unchanged(key)]
        if delete_model_id is not None:
            model = await self.model(delete_model_id)
            if model.record is not None:
                conditions.append(model.unchanged(registry.model_key(delete_model_id)))
                operations.extend(_removal(delete_model_id))
        done = await self._store.txn(conditions, operations)
        if done.succeeded:
            self._view.put_vmodel(new)
            if delete_model_id is not None:
                self._view.delete_model(delete_model_id)
        return done.succeeded

    async def delete_orphan(self, model_id: str) -> bool:
        """Delete an ``auto_delete`` model that no alias names; whether it was."""
        there = await self.model(model_id)
        if there.record is None or not there.record.auto_delete or await self._names_of(model_id):
            return False
        if there.mod_revision > self._view.revision:
            return False  # just written, perhaps with an alias that the view does not show yet
        key = registry.model_key(model_id)
        done = await self._store.txn([there.unchanged(key)], _removal(model_id))
        if done.succeeded:
            self._view.delete_model(model_id)
        return done.succeeded

    async def delete_failures(self, pairs: Collection[tuple[str, str]], now_ms: int) -> int:
        """Delete failure records that are expired or of no model; returns how many went."""
        conditions: list[Condition] = []
        operations: list[Operation] = []
        for model_id, instance_id in pairs:
            key = registry.failure_key(model_id, instance_id)
            found = await self._store.get(key)
            if found is None:
                self._view.delete_failure(model_id, instance_id)
                continue
            record = registry.decode_failure(model_id, instance_id, found.value)
            if record.expires_at_ms > now_ms and model_id in self._view.models:
                self._view.put_failure(record)  # it failed anew; the watch will say so too
                continue
            conditions.append(ModRevisionIs(key, found.mod_revision))
            operations.append(Delete(key))
        if not operations:
            return 0
        done = await self._store.txn(conditions, operations)
        return len(operations) if done.succeeded else 0

    async def forget_failures(self, model_ids: Collection[str] | None = None) -> frozenset[str]:
        """Delete every failure of those models, or of all: they may be tried again at once, since
        the cause has been seen to. Returns the models that had failed."""
        found = [
            failure
            for failure in self._view.all_failures()
            if model_ids is None or failure.model_id in model_ids
        ]
        for at in range(0, len(found), _BATCH):
            batch = found[at : at + _BATCH]
            keys = [registry.failure_key(one.model_id, one.instance_id) for one in batch]
            await self._store.txn([], [Delete(key) for key in keys])
            for one in batch:
                self._view.delete_failure(one.model_id, one.instance_id)
        return frozenset(one.model_id for one in found)

    async def delete_copies(self, pairs: Collection[tuple[str, str]]) -> int:
        """Delete copies whose instance has no record in the store itself; returns how many went."""
        conditions: list[Condition] = []
        operations: list[Operation] = []
        absent: dict[str, None] = {}
        for model_id, instance_id in pairs:
            key, instance_key = (
                registry.copy_key(model_id, instance_id),
                registry.instance_key(instance_id),
            )
            found = await self._store.get(key)
            if found is None:
                self._view.delete_copy(model_id, instance_id)
            elif instance_key in absent or await self._store.get(instance_key) is None:
                absent[instance_key] = None
                conditions.append(ModRevisionIs(key, found.mod_revision))
                operations.append(Delete(key))
        conditions += (KeyAbsent(instance_key) for instance_key in absent)
        if not operations:
            return 0
        done = await self._store.txn(conditions, operations)
        return len(operations) if done.succeeded else 0

    async def delete_last_used(self, instance_ids: Collection[str]) -> None:
        """Delete the blobs of instances that are still gone in the store itself."""
        gone = [i for i in instance_ids if await self._store.get(registry.instance_key(i)) is None]
        conditions = [KeyAbsent(registry.instance_key(i)) for i in gone]
        operations = [Delete(registry.last_used_key(i)) for i in gone]
        if gone and (await self._store.txn(conditions, operations)).succeeded:
            for instance_id in gone:
                self._view.delete_last_used(instance_id)


def _removal(model_id: str) -> list[Operation]:
    """A model with what is remembered about it. Its copies are their instances'."""
    return [
        Delete(registry.model_key(model_id)),
        Delete(registry.failures_prefix(model_id), prefix=True),
    ]


def _source(record: ModelRecord) -> tuple[str, str, str]:
    return record.model_type, record.key, record.path


def _merged(known: ModelRecord | None, wanted: ModelRecord) -> ModelRecord:
    """The model as wanted, with what the mesh has learnt of it."""
    if known is None:
        return wanted
    return replace(known, **{name: getattr(wanted, name) for name in _SCALING})


def is_applied(
    applied: AppliedModel, alias: VModelRecord | None, model: ModelRecord | None
) -> bool:
    """Whether ``apply`` would find these records as they should be, and write nothing.

    ``model`` is the alias's target."""
    return (
        alias is not None
        and model is not None
        and alias.owner == applied.alias.owner
        and alias.target_model_id == applied.alias.target_model_id
        and alias.manifest == applied.alias.manifest
        and _merged(model, applied.model) == model
    )


def contended(name: str) -> Unavailable:
    return Unavailable(
        f"{name!r} was being changed by others in each of {MAX_TRIES} tries: try again",
        retry_after_ms=RETRY_MS,
    )


def store_away(error: StoreUnavailable, what: str) -> Unavailable:
    """The error of a write that the store could not take, in words for the caller."""
    return Unavailable(
        f"{what}: the store (etcd) cannot be reached, so nothing can be changed now; models that "
        f"are registered keep answering ({error.message})",
        retry_after_ms=1_000,
    )
