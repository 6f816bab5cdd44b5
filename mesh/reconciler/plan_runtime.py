"""Serving pods and routers: what is desired against what is there, and how many pods. Pure.

``decide_replicas`` says how many pods a runtime has, ``plan_workloads`` what to write and to
remove in a namespace. Both are level-triggered: called again with what the last plan has led to,
they ask for nothing more. What is not desired any more is removed here; the API server's own
collection by ownerReference is not needed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any, Final

from mesh.core.errors import InvalidArgument
from mesh.quantity import parse_duration_ms
from mesh.reconciler.config import ControllerConfig
from mesh.reconciler.kube_resources import DEPLOYMENTS, SERVICES, Obj, Resource
from mesh.reconciler.workload_names import HASH, OWNED
from mesh.reconciler.workload_source import IDLE_AFTER, RuntimeSource

# Instances tell when they were used last every four minutes: a shorter pause would be a guess.
IDLE_MIN_MS: Final = 600_000


@dataclass(frozen=True, slots=True)
class RuntimeUsage:
    """What the registry and the controller know of one runtime in one namespace.

    ``models``: registered models that select it. ``last_used_at_ms``: the latest of them, 0 for
    never. ``loading``: copies that load now, and models that are yet to be loaded for the first
    time. ``demanded_at_ms``: the last time that a request asked for pods, 0 for never.
    ``unused_since_ms``: since when ``models`` is 0, None while it is not.
    """

    models: int = 0
    last_used_at_ms: int = 0
    loading: int = 0
    demanded_at_ms: int = 0
    unused_since_ms: int | None = None
    ready_instances: int = 0

    def since(self, unused_since_ms: int | None) -> RuntimeUsage:
        """The same, unused since then."""
        return replace(self, unused_since_ms=unused_since_ms)

    def plus(self, *, last_used_ms: int, loading: bool) -> RuntimeUsage:
        """With one more model."""
        return replace(
            self,
            models=self.models + 1,
            last_used_at_ms=max(self.last_used_at_ms, last_used_ms),
            loading=self.loading + loading,
        )


@dataclass(frozen=True, slots=True)
class Replicas:
    """``count`` pods, because of ``reason``; decide again at ``look_again_ms`` at the latest
    (None: only when something changes)."""

    count: int
    reason: str
    look_again_ms: int | None = None


@dataclass(frozen=True, slots=True)
class Apply:
    """Write this object (server-side apply)."""

    resource: Resource
    object: Obj


@dataclass(frozen=True, slots=True)
class Scale:
    """Set ``spec.replicas`` of a Deployment."""

    namespace: str
    name: str
    replicas: int


@dataclass(frozen=True, slots=True)
class Remove:
    """Delete this object; ``uid`` is the precondition."""

    resource: Resource
    namespace: str
    name: str
    uid: str


WorkloadAction = Apply | Scale | Remove


def decide_replicas(
    source: RuntimeSource,
    usage: RuntimeUsage,
    now_ms: int,
    config: ControllerConfig,
    current: int | None,
) -> Replicas:
    """``current``: ``spec.replicas`` of the Deployment that is there, None where there is none.

    A runtime with a ``refusal`` is not asked about.
    """
    full = _full(source, config, current)
    if not config.scale_to_zero or full.count == 0:
        return full
    if usage.models == 0:
        if not current:
            return Replicas(0, "unused")
        until_ms = (now_ms if usage.unused_since_ms is None else usage.unused_since_ms) + (
            config.grace_ms
        )
        if now_ms >= until_ms:
            return Replicas(0, "unused")
        return Replicas(full.count, "unused-lately", until_ms)
    idle_ms = idle_after_ms(source)
    if idle_ms is None:
        return full
    if usage.loading:
        return Replicas(full.count, "loading")
    until_ms = max(usage.last_used_at_ms, usage.demanded_at_ms) + idle_ms
    if now_ms >= until_ms:
        return Replicas(0, "idle")
    return Replicas(full.count, "used-lately", until_ms)


def idle_after_ms(source: RuntimeSource) -> int | None:
    """The annotation ``mesh.serving/scale-to-zero-after``; None where it is absent or no
    duration (``idle_warning`` says so)."""
    text = source.annotations.get(IDLE_AFTER)
    if text is None:
        return None
    try:
        return max(IDLE_MIN_MS, parse_duration_ms(text, IDLE_AFTER))
    except InvalidArgument:
        return None


def idle_warning(source: RuntimeSource) -> str:
    """What is wrong with that annotation; "" when nothing is."""
    text = source.annotations.get(IDLE_AFTER)
    if text is None:
        return ""
    where = f"metadata.annotations[{IDLE_AFTER}]"
    try:
        if parse_duration_ms(text, where) < IDLE_MIN_MS:
            return f"{where}: {text} is short of the least, {IDLE_MIN_MS // 60_000}m, which counts"
    except InvalidArgument as error:
        return error.message
    return ""


def _full(source: RuntimeSource, config: ControllerConfig, current: int | None) -> Replicas:
    """As many as when nothing were scaled to zero."""
    scale = source.autoscale
    if scale is not None:
        # Between its bounds the number is the autoscaler's.
        return Replicas(min(max(current or 0, scale.minimum), scale.maximum), "autoscaler")
    if source.replicas is not None:
        return Replicas(source.replicas, "spec.replicas")
    return Replicas(config.pods_per_runtime, "podsPerRuntime")


def plan_workloads(desired: Iterable[Obj], observed: Iterable[Obj]) -> tuple[WorkloadAction, ...]:
    """What to do in one namespace.

    ``desired``: all objects that should be there, of all its runtimes and its routers.
    ``observed``: all of ``OWNED`` that are there with the label ``OWNED_SELECTOR``.
    """
    there = {_key(one): one for one in observed}
    actions: list[WorkloadAction] = []
    wanted = set()
    by_kind: dict[str, list[Obj]] = {}
    for one in desired:
        wanted.add(_key(one))
        by_kind.setdefault(one["kind"], []).append(one)
    for resource in OWNED:
        for one in by_kind.get(resource.kind, ()):
            actions += _write(resource, one, there.get(_key(one)))
    for resource in reversed(OWNED):
        for key, one in there.items():
            gone = one["metadata"].get("deletionTimestamp")
            if key[0] == resource.kind and key not in wanted and not gone:
                actions.append(_removed(resource, one))
    return tuple(actions)


def _write(resource: Resource, one: Obj, there: Obj | None) -> tuple[WorkloadAction, ...]:
    if there is None or _hash(there) != _hash(one):
        if there is not None and _cannot_become(resource, there, one):
            return (_removed(resource, there),)  # and made anew once it is seen to be gone
        return (Apply(resource, one),)
    if resource is not DEPLOYMENTS:
        return ()
    replicas = one["spec"]["replicas"]
    if there["spec"].get("replicas", 1) == replicas:
        return ()
    metadata = one["metadata"]
    return (Scale(metadata["namespace"], metadata["name"], replicas),)


def _removed(resource: Resource, one: Obj) -> Remove:
    metadata = one["metadata"]
    return Remove(resource, metadata["namespace"], metadata["name"], metadata["uid"])


def _cannot_become(resource: Resource, there: Obj, one: Obj) -> bool:
    """Whether a field differs that the API server lets nobody change."""
    if resource is SERVICES:
        return _is_headless(there) != _is_headless(one)
    if resource is DEPLOYMENTS:
        return bool(there["spec"]["selector"] != one["spec"]["selector"])
    return False


def _is_headless(service: Obj) -> bool:
    return bool(service["spec"].get("clusterIP") == "None")


def _key(one: Obj) -> tuple[str, str]:
    return one["kind"], one["metadata"]["name"]


def _hash(one: Obj) -> Any:
    return (one["metadata"].get("annotations") or {}).get(HASH)
