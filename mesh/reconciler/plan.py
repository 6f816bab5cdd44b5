"""What to do about one InferenceService or Predictor: desired against observed, as actions. Pure.

``plan_service`` looks at one resource, or at the name of one that is gone; ``plan_orphans`` at the
aliases whose resource went while nobody watched. The shell carries actions out in order and plans
again whenever one of them changed the registry or the resource: a plan that needs the outcome of a
step ends with that step. A plan that was cut anywhere, planned again, leads to the same end, and
where all is as it should be the plan is empty.

Whose a name is: the finalizer stands in a resource before its name is registered, and goes when it
is not registered any more. A name belongs to one kind, told by the alias's owner; another kind of
that name is refused until it is free. Only what came from an API server (its manifest has a uid) is
ever unregistered here: what `mesh apply` wrote by hand is not.

A wrong spec, a runtime that is not there or a taken name is told in the status and leaves what was
registered before in place. While the registry is away nothing is unregistered, no finalizer goes,
and a status that is there stays as it is: the models keep serving.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal

from mesh.catalog import is_applied
from mesh.core.types import VModelRecord
from mesh.desired import desired_model
from mesh.kserve_status import (
    INVALID_SPEC,
    NO_REGISTRY,
    Endpoints,
    NameState,
    Refusal,
    Standing,
    same_status,
    service_status,
    standing_of,
)
from mesh.manifest import OWNER_OF, OWNERS, AppliedModel, applied_uid
from mesh.manifest_annotations import DEPLOYMENT_MODE, MODEL_MESH
from mesh.runtime_selection import Chosen, RuntimeOffer

Obj = dict[str, Any]

FINALIZER: Final = "mesh.serving/registry"
FIELDS_NOT_ACTED_ON: Final = "FieldsNotActedOn"  # the reason of an event
# The registry's return is told of by its own events; this is for when one is missed.
RETRY_MS: Final = 30_000
_WARNING_CHARS: Final = 1_000  # an Event takes 1,024


# ---- actions ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class AddFinalizer:
    """Write ``FINALIZER`` into the resource."""


@dataclass(frozen=True, slots=True)
class RemoveFinalizer:
    """Take ``FINALIZER`` out of the resource."""


@dataclass(frozen=True, slots=True)
class Register:
    """Write model and alias (``Catalog.apply``)."""

    applied: AppliedModel


@dataclass(frozen=True, slots=True)
class Unregister:
    """Delete the alias, if it is still ``owner``'s, and its models (``Catalog.delete``)."""

    name: str
    owner: str
    model_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class WriteStatus:
    """Replace the whole status; {} clears it."""

    status: Obj


@dataclass(frozen=True, slots=True)
class Emit:
    """Record an event on the resource."""

    type: Literal["Normal", "Warning"]
    reason: str
    message: str


@dataclass(frozen=True, slots=True)
class Retry:
    """Plan again after so long, if nothing asks for it earlier."""

    after_ms: int
    reason: str


Action = AddFinalizer | RemoveFinalizer | Register | Unregister | WriteStatus | Emit | Retry


# ---- input --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class StorageSecret:
    """The namespace's storage secret. ``keys``: None where there is no such secret; not
    ``readable``: nobody knows, and nothing is said of it."""

    name: str
    namespace: str
    keys: frozenset[str] | None = None
    readable: bool = True

    def fault(self, key: str) -> str:
        """What it lacks for a model that needs ``key``; "" for nothing."""
        if not key or not self.readable or (self.keys is not None and key in self.keys):
            return ""
        where = f"storage secret {self.name!r} of namespace {self.namespace!r}"
        if self.keys is None:
            return f"specified storage key {key!r} not found: there is no {where}"
        there = ", ".join(sorted(self.keys)[:20]) or "none"
        return f"specified storage key {key!r} not found in {where}; its keys: {there}"


@dataclass(frozen=True, slots=True)
class Observed:
    """All that a plan looks at besides the resource.

    ``registry_reachable``: etcd answers, and ``state`` comes from a view that is whole.
    ``take_all``: every InferenceService is ours, whatever its deployment mode. Not ``served``: the
    namespace's mesh is given up, and nothing in it is ours.
    ``warned_generation`` is the last one whose warnings were told, as far as the caller remembers.
    ``register_fault``: why this generation cannot be registered, whatever is tried.
    """

    kind: str
    state: NameState
    endpoints: Endpoints
    secret: StorageSecret
    now_ms: int
    offers: Collection[RuntimeOffer] = ()
    registry_reachable: bool = True
    take_all: bool = False
    served: bool = True
    warned_generation: int = 0
    register_fault: str = ""


# ---- plans --------------------------------------------------------------------------------------


def is_ours(resource: Mapping[str, Any], *, take_all: bool) -> bool:
    """Whether this mesh is asked to serve it: every Predictor, and the InferenceServices in
    ModelMesh's mode, or all."""
    if take_all or resource.get("kind") == "Predictor":
        return True
    annotations = _metadata(resource).get("annotations") or {}
    return bool(annotations.get(DEPLOYMENT_MODE) == MODEL_MESH)


def plan_service(resource: Mapping[str, Any] | None, observed: Observed) -> tuple[Action, ...]:
    """``resource``: as the API server has it, None when it is gone."""
    metadata = _metadata(resource or {})
    finalizers: Collection[str] = metadata.get("finalizers") or ()
    ours = _alias_of_ours(observed)
    if resource is not None and "deletionTimestamp" not in metadata:
        if observed.served and is_ours(resource, take_all=observed.take_all):
            return _plan_served(resource, observed, FINALIZER in finalizers)
        ours = ours if ours is not None and _is_of(ours, metadata) else None
    if FINALIZER not in finalizers and ours is None:
        return ()
    if not observed.registry_reachable:
        name = observed.state.name
        message = f"the mesh's registry (etcd) cannot be reached: {name!r} stays registered until"
        told = Emit("Warning", "RegistryAway", f"{message} it is back")
        return (told, Retry(RETRY_MS, "registry away"))
    return tuple(_release(resource, ours, FINALIZER in finalizers))


def plan_orphans(
    resources: Iterable[Mapping[str, Any]],
    aliases: Iterable[VModelRecord],
    *,
    take_all: bool = False,
    served: bool = True,
) -> tuple[Unregister, ...]:
    """Aliases that an API server's resource was registered for, and no resource holds any more: the
    controller was away, or the finalizer was taken off by force. Only with every resource of the
    namespace, and a view that is whole."""
    held = {
        (OWNER_OF[str(one["kind"])], _metadata(one).get("name"))
        for one in resources
        if (served and is_ours(one, take_all=take_all))
        or FINALIZER in (_metadata(one).get("finalizers") or ())
    }
    return tuple(
        _unregister(alias)
        for alias in sorted(aliases, key=lambda alias: alias.name)
        if alias.owner in OWNERS
        and (alias.owner, alias.name) not in held
        and applied_uid(alias.manifest)
    )


def _release(
    resource: Mapping[str, Any] | None, ours: VModelRecord | None, held: bool
) -> Iterable[Action]:
    """Leave nothing behind: the registry first, what tells of it next, the finalizer last."""
    if ours is not None:
        yield _unregister(ours)
    if resource is None:
        return
    deleted = "deletionTimestamp" in _metadata(resource)
    if not deleted and (resource.get("status") or {}).get("deploymentMode") == MODEL_MESH:
        yield WriteStatus({})
    if held:
        yield RemoveFinalizer()


def _plan_served(resource: Mapping[str, Any], observed: Observed, held: bool) -> tuple[Action, ...]:
    applied, chosen, refusal = _desired(resource, observed)
    warnings = applied.warnings if applied is not None else ()
    if not observed.registry_reachable:
        return _plan_without_registry(resource, observed, refusal, warnings)
    mine = _alias_of_ours(observed) is not None
    state = observed.state if mine else NameState(observed.state.name)
    actions: list[Action] = []
    registered = (
        applied is not None
        and state.target is not None
        and is_applied(applied, state.alias, state.target.record)
    )
    if not held and (mine or refusal is None):
        actions.append(AddFinalizer())
    if applied is not None and refusal is None and not registered:
        return (*actions, Register(applied))
    secret_fault = observed.secret.fault(applied.secret_key) if applied is not None else ""
    runtime = chosen.name if chosen is not None else ""
    standing = standing_of(state, refusal=refusal, secret_fault=secret_fault, runtime=runtime)
    return (*actions, *_tell(resource, observed, standing, chosen, warnings))


def _plan_without_registry(
    resource: Mapping[str, Any],
    observed: Observed,
    refusal: Refusal | None,
    warnings: Collection[str],
) -> tuple[Action, ...]:
    """Say so where nothing is said yet; a status that is there may still be true."""
    retry = Retry(RETRY_MS, "registry away")
    if (resource.get("status") or {}).get("conditions"):
        return (retry,)
    standing = NO_REGISTRY
    if refusal is not None:
        standing = standing_of(NameState(observed.state.name), refusal=refusal)
    return (*_tell(resource, observed, standing, None, warnings), retry)


def _desired(
    resource: Mapping[str, Any], observed: Observed
) -> tuple[AppliedModel | None, Chosen | None, Refusal | None]:
    """What is to be registered, with the labels of its runtime, and what forbids it."""
    found = desired_model(resource, observed.offers, now_ms=observed.now_ms)
    if found.applied is None:
        return None, None, found.refusal
    if owner := _taken_by(observed):
        return found.applied, found.chosen, Refusal(INVALID_SPEC, f"metadata.name: {owner}")
    if found.refusal is None and observed.register_fault:
        return found.applied, found.chosen, Refusal(INVALID_SPEC, observed.register_fault)
    return found.applied, found.chosen, found.refusal


def _taken_by(observed: Observed) -> str:
    """Whose the name is, if it is not free for a resource of this kind."""
    state = observed.state
    if state.direct:
        return f"{state.name!r} is the id of a directly registered model: unregister it first"
    alias = state.alias
    if alias is None or alias.owner == OWNER_OF[observed.kind]:
        return ""
    kind = OWNERS.get(alias.owner)
    if kind is not None:
        return f"{state.name!r} belongs to the {kind} of that name: delete it, or use another name"
    owner = f"owner {alias.owner!r}" if alias.owner else "no owner"
    return f"{state.name!r} is an alias of {owner}, registered directly: delete it first"


def _tell(
    resource: Mapping[str, Any],
    observed: Observed,
    standing: Standing,
    chosen: Chosen | None,
    warnings: Collection[str],
) -> Iterable[Action]:
    """Events before the status: what the status says has been told."""
    before = resource.get("status") or {}
    status = service_status(
        resource, standing, chosen=chosen, endpoints=observed.endpoints, now_ms=observed.now_ms
    )
    generation = _metadata(resource).get("generation", 0)
    if warnings and generation > max(
        observed.warned_generation, before.get("observedGeneration") or 0
    ):
        yield Emit("Warning", FIELDS_NOT_ACTED_ON, "; ".join(warnings)[:_WARNING_CHARS])
    failure, known = _failure_of(status), _failure_of(before)
    if failure and (failure.get("reason"), failure.get("message")) != (
        known.get("reason"),
        known.get("message"),
    ):
        yield Emit("Warning", failure["reason"], failure["message"][:_WARNING_CHARS])
    if not same_status(before, status):
        yield WriteStatus(status)


def _failure_of(status: Mapping[str, Any]) -> Mapping[str, Any]:
    model = status.get("modelStatus") or status
    return model.get("lastFailureInfo") or {}


def _alias_of_ours(observed: Observed) -> VModelRecord | None:
    """The alias, if it was registered for this resource or one before it of that name."""
    alias = observed.state.alias
    if alias is None or alias.owner != OWNER_OF[observed.kind]:
        return None
    return alias if applied_uid(alias.manifest) else None


def _is_of(alias: VModelRecord, metadata: Mapping[str, Any]) -> bool:
    taken = FINALIZER in (metadata.get("finalizers") or ())
    return taken or applied_uid(alias.manifest) == metadata.get("uid")


def _unregister(alias: VModelRecord) -> Unregister:
    models = sorted({alias.active_model_id, alias.target_model_id})
    return Unregister(alias.name, alias.owner, tuple(models))


def _metadata(resource: Mapping[str, Any]) -> Mapping[str, Any]:
    metadata = resource.get("metadata")
    return metadata if isinstance(metadata, dict) else {}
