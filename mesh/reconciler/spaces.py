"""The pods of each namespace's mesh: routers and runtimes, as resources, configuration and use say.

One namespace is one key: what its runtimes need is decided together (``plan_runtime``) and written
object by object. An object that is refused is told of as an event of its runtime, and the others go
on. How a runtime is used is read from the registry alone; a Deployment's status says nothing here.

Routers are told which runtimes have pods on demand, so that a request for a model of one without
pods waits, and asks for them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol, assert_never

from mesh.core.errors import InvalidArgument, MeshError
from mesh.core.types import CopyState, ModelRecord
from mesh.core.view import ClusterView
from mesh.reconciler.config import ControllerConfig
from mesh.reconciler.events import EventRecorder
from mesh.reconciler.kube import ApiError, Kube, Obj, Resource
from mesh.reconciler.kube_resources import DEPLOYMENTS
from mesh.reconciler.meshes import Mesh
from mesh.reconciler.plan_runtime import (
    Apply,
    Remove,
    RuntimeUsage,
    Scale,
    WorkloadAction,
    decide_replicas,
    idle_warning,
    plan_workloads,
)
from mesh.reconciler.work_queue import Again
from mesh.reconciler.workload import OWNED, claims_of, refusal, runtime_objects, workload_name
from mesh.reconciler.workload_router import router_objects
from mesh.reconciler.workload_source import RuntimeSource
from mesh.serving_runtime import runtime_label

logger = logging.getLogger(__name__)

_LABEL: str = runtime_label("")


class Cluster(Protocol):
    """What is known of the cluster: the informers' stores, read."""

    def runtimes(self, namespace: str) -> list[RuntimeSource]:
        """Those that the namespace's models may use, its own before the cluster's."""

    def served(self, namespace: str) -> bool:
        """Whether the namespace has a mesh; not: what is left of it is to go."""

    def writable(self, kind: Resource) -> bool:
        """Whether the server has this kind of owned object, and lets it be watched."""

    def owned(self, namespace: str) -> list[Obj]:
        """Objects that this controller has made in the namespace."""

    def storage(self, namespace: str) -> Mapping[str, Mapping[str, object]]:
        """The entries of the namespace's storage secret that can be read."""


@dataclass(slots=True)
class _Noticed:
    """What only this process remembers of a runtime in a namespace."""

    unused_since_ms: int | None = None
    demanded_at_ms: int = 0  # the last demand, which is deleted when it is met
    said: str = ""  # what its last warning event said


class Spaces:
    """``now_ms`` is wall clock time."""

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
        self._noticed: dict[tuple[str, str], _Noticed] = {}

    async def reconcile(self, mesh: Mesh, config: ControllerConfig) -> Again | None:
        """Bring one namespace's pods to what they should be. Raises ApiError for the first object
        that could not be written, after all have been tried."""
        namespace = mesh.namespace
        observed = self._cluster.owned(namespace)
        sources: list[RuntimeSource] = []
        desired: list[Obj] = []
        if self._cluster.served(namespace):
            runtimes = self._cluster.runtimes(namespace)
            sources = [one for one in runtimes if self._runs(one, namespace)]
            desired = list(router_objects(config, namespace=namespace))
        again_ms: int | None = None
        now_ms = self._now_ms()
        usages = usage_of(mesh, sources)
        claims = claims_of(self._cluster.storage(namespace), _claims(mesh.view), config)
        for source in sources:
            usage = self._remembered(namespace, source, usages[source.name], now_ms)
            current = _replicas_of(observed, workload_name(config, source.name))
            decided = decide_replicas(source, usage, now_ms, config, current)
            if decided.look_again_ms is not None:
                again_ms = min(again_ms or decided.look_again_ms, decided.look_again_ms)
            if current is not None and current != decided.count:
                logger.info(
                    "%s/%s: %d pods instead of %d (%s)",
                    namespace, source.name, decided.count, current, decided.reason,
                )  # fmt: skip
            try:
                desired += runtime_objects(
                    source,
                    config,
                    namespace=namespace,
                    replicas=decided.count,
                    claims=claims,
                )
            except InvalidArgument as error:
                self._warn(namespace, source, "InvalidRuntime", error.message)
                # What runs of it goes on running: nothing of it is "not desired any more".
                desired += _of(observed, source, config)
        refused = {kind.kind for kind in OWNED if not self._cluster.writable(kind)}
        desired = [one for one in desired if one["kind"] not in refused]
        await self._offer(mesh, sources)
        await self._carry_out(plan_workloads(desired, observed), sources)
        await self._meet(mesh, sources)
        return None if again_ms is None else Again(max(0.05, (again_ms - now_ms) / 1_000))

    def forget(self, namespace: str) -> None:
        for key in [key for key in self._noticed if key[0] == namespace]:
            del self._noticed[key]

    def _runs(self, source: RuntimeSource, namespace: str) -> bool:
        refused = refusal(source)
        warning = idle_warning(source)
        if refused is not None:
            if refused.reason != "SingleModelRuntime":  # KServe's own, which are no business here
                self._warn(namespace, source, refused.reason, refused.message)
            return False
        self._warn(namespace, source, "InvalidAnnotation", warning)
        return True

    def _warn(self, namespace: str, source: RuntimeSource, reason: str, text: str) -> None:
        """Once for each text."""
        noticed = self._noticed.setdefault((namespace, source.name), _Noticed())
        if text and noticed.said != text:
            self._events.emit(source.resource, "Warning", reason, text)
        noticed.said = text

    def _remembered(
        self, namespace: str, source: RuntimeSource, usage: RuntimeUsage, now_ms: int
    ) -> RuntimeUsage:
        noticed = self._noticed.setdefault((namespace, source.name), _Noticed())
        if usage.models:
            noticed.unused_since_ms = None
        elif noticed.unused_since_ms is None:
            noticed.unused_since_ms = now_ms
        noticed.demanded_at_ms = max(noticed.demanded_at_ms, usage.demanded_at_ms)
        return replace(
            usage,
            unused_since_ms=noticed.unused_since_ms,
            demanded_at_ms=noticed.demanded_at_ms,
        )

    async def _offer(self, mesh: Mesh, sources: Iterable[RuntimeSource]) -> None:
        offered = {
            one.name: {
                "formats": list(one.runtime.model_types),
                "labels": [runtime_label(one.name)],
            }
            for one in sources
        }
        await mesh.offer_runtimes(offered)

    async def _carry_out(
        self, actions: Iterable[WorkloadAction], sources: Iterable[RuntimeSource]
    ) -> None:
        failed: ApiError | None = None
        for action in actions:
            try:
                await self._act(action)
            except ApiError as error:
                failed = failed or error
                logger.warning("%s", error)
        if failed is not None:
            raise failed

    async def _act(self, action: WorkloadAction) -> None:
        match action:
            case Apply():
                await self._kube.apply(action.resource, action.object)
            case Scale():
                patch = {"spec": {"replicas": action.replicas}}
                await self._kube.patch(DEPLOYMENTS, action.namespace, action.name, patch)
            case Remove():
                await self._kube.delete(
                    action.resource, action.namespace, action.name, uid=action.uid
                )
            case _:
                assert_never(action)
        self._counted(type(action).__name__.lower())

    async def _meet(self, mesh: Mesh, sources: Iterable[RuntimeSource]) -> None:
        """Demands that are answered: an instance of the runtime is there, or the runtime is not."""
        names = {one.name for one in sources}
        for demand in list(mesh.demands.values()):
            label = runtime_label(demand.runtime)
            there = any(s.ready and label in s.labels for s in mesh.view.instances.values())
            if there or demand.runtime not in names:
                try:
                    await mesh.met(demand)
                except MeshError as error:
                    logger.info("demand for %s stays: %s", demand.runtime, error.message)


def usage_of(mesh: Mesh, sources: Iterable[RuntimeSource]) -> dict[str, RuntimeUsage]:
    """By runtime. A model counts for the runtime that was chosen for it; one that was registered
    by itself, for every runtime of its format."""
    view = mesh.view
    by_format: dict[str, list[str]] = {}
    found: dict[str, RuntimeUsage] = {}
    for source in sources:
        demand = mesh.demands.get(source.name)
        label = runtime_label(source.name)
        ready = sum(s.ready and label in s.labels for s in view.instances.values())
        found[source.name] = RuntimeUsage(
            demanded_at_ms=demand.at_ms if demand is not None else 0, ready_instances=ready
        )
        for name in source.runtime.model_types:
            by_format.setdefault(name, []).append(source.name)
    awaited = {view.vmodels[name].target_model_id for name in view.vmodels_in_transition()}
    for model in view.models.values():
        copies = view.copies_of(model.model_id)
        loading = model.model_id in awaited or any(
            copy.state is CopyState.LOADING for copy in copies
        )
        # Instances tell uses minutes later: what has just loaded was asked for.
        last_used_ms = max(
            view.last_used_at_ms(model.model_id), *(copy.loaded_at_ms for copy in copies), 0
        )
        for name in _runtimes_of(model, by_format):
            if name in found:
                found[name] = found[name].plus(last_used_ms=last_used_ms, loading=loading)
    return found


def _runtimes_of(model: ModelRecord, by_format: Mapping[str, list[str]]) -> Iterable[str]:
    chosen = [
        label.removeprefix(_LABEL)
        for label in (*model.required_labels, *model.preferred_labels)
        if label.startswith(_LABEL)
    ]
    return chosen or by_format.get(model.model_type, ())


def _claims(view: ClusterView) -> set[str]:
    """Volume claims that registered models lie in."""
    scheme = "pvc://"
    return {
        model.path.removeprefix(scheme).partition("/")[0]
        for model in view.models.values()
        if model.path.startswith(scheme)
    }


def _replicas_of(observed: Iterable[Obj], name: str) -> int | None:
    for one in observed:
        if one["kind"] == DEPLOYMENTS.kind and one["metadata"]["name"] == name:
            return int(one["spec"].get("replicas", 1))
    return None


def _of(observed: Iterable[Obj], source: RuntimeSource, config: ControllerConfig) -> list[Obj]:
    """What is there of a runtime."""
    name = workload_name(config, source.name)
    return [one for one in observed if (one["metadata"].get("labels") or {}).get("name") == name]
