"""Carries out the plans of services: the API server by ``kube``, the registry by ``meshes``.

Plans until nothing is left to be done, since a plan ends where it needs to know what came of a
step. What an action wrote is what the next plan looks at, not the informer's copy, which lags.

How it fails: an ApiError or Unavailable ends the turn, and the queue tries again later; a name that
the registry refuses for good is told in the status. A resource that is missing here is asked for
once more before anything is unregistered: an informer that lags must not cost a model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping
from typing import Any, Final, Protocol, assert_never

from mesh.core.errors import AlreadyExists, FailedPrecondition, InvalidArgument
from mesh.kserve_status import endpoints_of, name_state
from mesh.manifest import OWNER_OF, applied_uid
from mesh.reconciler.config import ControllerConfig
from mesh.reconciler.events import EventRecorder
from mesh.reconciler.kube import ApiConflict, ApiNotFound, Kube, Obj, Resource
from mesh.reconciler.kube_resources import (
    CLUSTER_SERVING_RUNTIMES,
    INFERENCE_SERVICES,
    PREDICTORS,
    SECRETS,
    SERVING_RUNTIMES,
)
from mesh.reconciler.meshes import Mesh
from mesh.reconciler.plan import (
    FIELDS_NOT_ACTED_ON,
    FINALIZER,
    Action,
    AddFinalizer,
    Emit,
    Observed,
    Register,
    RemoveFinalizer,
    Retry,
    StorageSecret,
    Unregister,
    WriteStatus,
    plan_orphans,
    plan_service,
)
from mesh.reconciler.work_queue import Again
from mesh.reconciler.workload_source import RuntimeSource, refusal
from mesh.runtime_selection import RuntimeOffer
from mesh.storage_folder import data_of

logger = logging.getLogger(__name__)

# Plans of one turn: finalizer and registration, status, and room for somebody else's change.
_PLANS_MAX: Final = 6
# Conflicts in one turn, each answered by a fresh look, before others have theirs.
_CONFLICTS_MAX: Final = 4
# While runtimes cannot be read, which their informers complain of.
_BLIND_S: Final = 5.0

SERVICE_KINDS: Final = (INFERENCE_SERVICES, PREDICTORS)


class Cluster(Protocol):
    """What is known of the cluster: the informers' stores, read."""

    def known(self, *kinds: Resource) -> bool:
        """Whether what is missing of these kinds does not exist."""

    def served(self, namespace: str) -> bool:
        """Whether the namespace has a mesh; not: what is left of it is to go."""

    def resource(self, kind: Resource, namespace: str, name: str) -> Obj | None: ...

    def learn(self, kind: Resource, obj: Obj) -> None:
        """What a write has returned."""

    def resources(self, namespace: str) -> list[Obj]:
        """Every InferenceService and Predictor of a namespace."""

    def runtimes(self, namespace: str) -> list[RuntimeSource]: ...

    def secret(self, namespace: str) -> Obj | None:
        """The namespace's storage secret."""


class Services:
    """``now_ms`` is wall clock time; ``counted`` hears the name of each action."""

    def __init__(
        self,
        kube: Kube,
        cluster: Cluster,
        events: EventRecorder,
        *,
        counted: Callable[[str], None],
        now_ms: Callable[[], int],
    ) -> None:
        self._kube = kube
        self._cluster = cluster
        self._events = events
        self._counted = counted
        self._now_ms = now_ms
        self._warned: dict[tuple[str, str, str], int] = {}  # the generation that was warned of
        self._told_blind: set[str] = set()  # uids

    async def reconcile(
        self, mesh: Mesh, config: ControllerConfig, kind: Resource, namespace: str, name: str
    ) -> Again | None:
        """One turn of one name. Raises ApiError, Unavailable."""
        resource = self._cluster.resource(kind, namespace, name)
        if resource is None:
            if not is_ours(mesh, kind, name):
                self._warned.pop((kind.plural, namespace, name), None)
                return None
            resource = await self._asked(kind, namespace, name)
        if self._blind_to(resource, namespace):
            return Again(_BLIND_S)  # it would look as if there were no runtime for it
        turn = _Turn(self, mesh, kind, namespace, name, resource)
        for _ in range(_PLANS_MAX + _CONFLICTS_MAX):
            actions = plan_service(turn.resource, self._observed(turn, config))
            if not await turn.carry_out(actions):
                return turn.again
        return Again(1.0)

    def orphans(self, mesh: Mesh | None, config: ControllerConfig) -> set[str]:
        """Names that are registered for resources which are not there."""
        if mesh is None or not mesh.synced or not self._cluster.known(*SERVICE_KINDS):
            return set()
        found = plan_orphans(
            self._cluster.resources(mesh.namespace),
            mesh.view.vmodels.values(),
            take_all=config.take_all,
            served=self._cluster.served(mesh.namespace),
        )
        return {one.name for one in found}

    def _blind_to(self, resource: Obj | None, namespace: str) -> bool:
        """Whether a plan for it needs runtimes, which nobody lets us read. It is told once."""
        if self._cluster.known(SERVING_RUNTIMES, CLUSTER_SERVING_RUNTIMES):
            self._told_blind.clear()
            return False
        if resource is None or not self._cluster.served(namespace):
            return False
        if "deletionTimestamp" in resource["metadata"]:
            return False
        uid = resource["metadata"]["uid"]
        if uid not in self._told_blind:
            self._told_blind.add(uid)
            message = "the controller cannot read runtimes, and waits; its log says why"
            self._events.emit(resource, "Warning", "RuntimesUnknown", message)
        return True

    async def _asked(self, kind: Resource, namespace: str, name: str) -> Obj | None:
        try:
            return await self._kube.get(kind, namespace, name)
        except ApiNotFound:
            return None

    async def fresh(self, turn: _Turn) -> Obj | None:
        """The resource as the API server has it now; None when it is gone. Raises ApiError."""
        found = await self._asked(turn.kind, turn.namespace, turn.name)
        if found is not None:
            self._cluster.learn(turn.kind, found)
        return found

    def _observed(self, turn: _Turn, config: ControllerConfig) -> Observed:
        namespace, mesh = turn.namespace, turn.mesh
        secret = self._cluster.secret(namespace)
        keys = frozenset(data_of(secret)) if secret is not None else None
        now_ms = self._now_ms()
        return Observed(
            kind=turn.kind.kind,
            state=name_state(mesh.view, turn.name, now_ms),
            endpoints=endpoints_of(
                namespace,
                service=config.service_name,
                grpc_port=config.grpc_port,
                rest_port=config.rest_port,
                tls=bool(config.tls_secret),
            ),
            secret=StorageSecret(
                config.storage_secret, namespace, keys, readable=self._cluster.known(SECRETS)
            ),
            now_ms=now_ms,
            offers=[
                _offer(one) for one in self._cluster.runtimes(namespace) if _can_have_pods(one)
            ],
            registry_reachable=mesh.synced and bool(mesh.reachable),
            take_all=config.take_all,
            served=self._cluster.served(namespace),
            warned_generation=self._warned.get(turn.key, 0),
            register_fault=turn.register_fault,
        )

    def warned(self, key: tuple[str, str, str], generation: int) -> None:
        self._warned[key] = generation

    def emit(self, resource: Obj, action: Emit) -> None:
        self._events.emit(resource, action.type, action.reason, action.message)

    async def write(self, turn: _Turn, action: AddFinalizer | RemoveFinalizer | WriteStatus) -> Obj:
        """The resource as it is now. Raises ApiError; ApiNotFound where it is gone."""
        found = await self._write(turn, action)
        if not isinstance(action, RemoveFinalizer):  # which may have been the end of it
            self._cluster.learn(turn.kind, found)
        return found

    async def _write(
        self, turn: _Turn, action: AddFinalizer | RemoveFinalizer | WriteStatus
    ) -> Obj:
        assert turn.resource is not None
        resource, kind = turn.resource, turn.kind
        if isinstance(action, WriteStatus) and turn.conflicts:
            # Nobody else writes the status: only what changed of it, whatever the rest is by now.
            patch = {
                "metadata": {"uid": resource["metadata"]["uid"]},
                "status": merge_patch(resource.get("status") or {}, action.status),
            }
            return await self._kube.patch_status(kind, turn.namespace, turn.name, patch)
        if isinstance(action, WriteStatus):
            return await self._kube.replace_status(kind, {**resource, "status": action.status})
        metadata = resource["metadata"]
        finalizers = [one for one in metadata.get("finalizers") or () if one != FINALIZER]
        if isinstance(action, AddFinalizer):
            finalizers.append(FINALIZER)
        change: dict[str, Any] = {
            "finalizers": finalizers,
            "resourceVersion": metadata["resourceVersion"],
        }
        return await self._kube.patch(kind, turn.namespace, turn.name, {"metadata": change})

    def count(self, action: Action) -> None:
        self._counted(type(action).__name__.lower())


class _Turn:
    """One turn of one name: the resource as it is after each write, and what was learnt."""

    def __init__(
        self,
        services: Services,
        mesh: Mesh,
        kind: Resource,
        namespace: str,
        name: str,
        resource: Obj | None,
    ) -> None:
        self.mesh = mesh
        self.kind = kind
        self.namespace = namespace
        self.name = name
        self.resource = resource
        self.again: Again | None = None
        self.register_fault = ""
        self.conflicts = 0
        self._services = services

    @property
    def key(self) -> tuple[str, str, str]:
        return self.kind.plural, self.namespace, self.name

    async def carry_out(self, actions: Collection[Action]) -> bool:
        """Whether something was written that another plan has to look at."""
        wrote = False
        for action in actions:
            self._services.count(action)
            try:
                wrote |= await self._act(action)
            except ApiNotFound:  # it went meanwhile; its informer says so
                self.resource = None
                return is_ours(self.mesh, self.kind, self.name)
            except ApiConflict:
                # Somebody writes it all the time: the informer's copy would always be behind.
                self.conflicts += 1
                if self.conflicts > _CONFLICTS_MAX:
                    raise
                self.resource = await self._services.fresh(self)
                return True
        return wrote

    async def _act(self, action: Action) -> bool:
        match action:
            case AddFinalizer() | RemoveFinalizer() | WriteStatus():
                self.resource = await self._services.write(self, action)
                return not isinstance(action, RemoveFinalizer)
            case Register():
                try:
                    done = await self.mesh.register(action.applied)
                except (AlreadyExists, FailedPrecondition, InvalidArgument) as error:
                    self.register_fault = error.message
                else:
                    logger.info("%s/%s: %s as %s", self.namespace, self.name, done,
                                action.applied.model.model_id)  # fmt: skip
                return True
            case Unregister():
                await self.mesh.unregister(action.name, action.owner)
                logger.info("%s/%s: unregistered", self.namespace, self.name)
                return True
            case Emit():
                if self.resource is not None:
                    self._services.emit(self.resource, action)
                    if action.reason == FIELDS_NOT_ACTED_ON:
                        generation = self.resource["metadata"].get("generation", 0)
                        self._services.warned(self.key, generation)
                return False
            case Retry():
                self.again = Again(action.after_ms / 1_000)
                return False
            case _:
                assert_never(action)


def merge_patch(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, Any]:
    """The JSON merge patch (RFC 7386) that makes one of the other."""
    patch: dict[str, Any] = dict.fromkeys(before.keys() - after.keys())
    for key, value in after.items():
        known = before.get(key)
        if isinstance(value, dict) and isinstance(known, dict):
            if inner := merge_patch(known, value):
                patch[key] = inner
        elif key not in before or known != value:
            patch[key] = value
    return patch


def is_ours(mesh: Mesh | None, kind: Resource, name: str) -> bool:
    """Whether the name is registered for a resource of that kind from an API server."""
    alias = mesh.view.vmodels.get(name) if mesh is not None else None
    return (
        alias is not None
        and alias.owner == OWNER_OF[kind.kind]
        and bool(applied_uid(alias.manifest))
    )


def _can_have_pods(source: RuntimeSource) -> bool:
    """Of the others, those that are disabled or not multiModel are refused by name, with KServe's
    reasons."""
    refused = refusal(source)
    return refused is None or refused.reason in ("RuntimeDisabled", "SingleModelRuntime")


def _offer(source: RuntimeSource) -> RuntimeOffer:
    created_at = source.resource["metadata"].get("creationTimestamp", "")
    return RuntimeOffer(source.runtime, cluster=source.is_cluster_wide, created_at=created_at)
