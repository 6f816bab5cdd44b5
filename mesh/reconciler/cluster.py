"""What is known of the cluster: an informer for each kind, and questions to their stores.

Nothing is decided or written here. How it fails: a kind that cannot be read is not ``known``, which
its informer's log line and ``unknown()`` explain; whoever asks must then not take what is missing
for what does not exist.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Any, Final, Protocol

from mesh.core.errors import InvalidArgument
from mesh.reconciler.config import CONFIG_MAP
from mesh.reconciler.events import EventRecorder
from mesh.reconciler.informer import Informer
from mesh.reconciler.kube import Kube
from mesh.reconciler.kube_resources import (
    CLUSTER_SERVING_RUNTIMES,
    CONFIG_MAPS,
    INFERENCE_SERVICES,
    NAMESPACES,
    PREDICTORS,
    SECRETS,
    SERVING_RUNTIMES,
    Obj,
    Resource,
)
from mesh.reconciler.plan import FINALIZER
from mesh.reconciler.services import SERVICE_KINDS
from mesh.reconciler.settings import ControllerSettings
from mesh.reconciler.storage import entries_of
from mesh.reconciler.workload import OWNED, OWNED_SELECTOR
from mesh.reconciler.workload_source import RuntimeSource

log = logging.getLogger(__name__)

# ModelMesh's label of the namespaces that it serves.
ENABLED_SELECTOR: Final = "modelmesh-enabled=true"
# The operator's ConfigMap beside the controller's own ones, which are another informer.
_CONFIG: Final = Resource("", "v1", "configmaps", "ConfigMap (configuration)")


class ClusterListener(Protocol):
    """Who hears of changes; called from the loop, must not block."""

    def changed(self, resource: Resource, namespace: str, name: str, /) -> None:
        """An object came, changed or went."""

    def config_changed(self) -> None:
        """The operator's ConfigMap did, or it is known for the first time."""

    def all_known(self) -> None:
        """A kind that could not be read, or was another, can be read now."""


class Cluster:
    """Run ``run()`` as a task. ``on_back`` hears that the API server answers again."""

    def __init__(
        self,
        settings: ControllerSettings,
        kube: Kube,
        events: EventRecorder,
        listener: ClusterListener,
        on_back: Callable[[], None],
    ) -> None:
        self._whole = settings.all_namespaces
        self._own_namespace = settings.namespace or kube.namespace
        self._workloads = settings.workloads
        self._secret_name = settings.config.storage_secret
        self._kube = kube
        self._events = events
        self._listener = listener
        self._on_back = on_back
        self._runtimes_read: dict[tuple[str, str, str], tuple[str, RuntimeSource | None]] = {}
        self._config_map = Informer(
            kube,
            CONFIG_MAPS,
            self._own_namespace,
            on_change=lambda *_: listener.config_changed(),
            field_selector=f"metadata.name={CONFIG_MAP}",
        )
        self._watched = self._make_informers()
        self._secret_renamed = asyncio.Event()
        self._secrets_settled = asyncio.Event()
        self._settled = asyncio.Event()

    # ---- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. An error of a part is a defect, and ends it."""
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self._config_map.run())
            await self._config_map.wait_settled()
            self._listener.config_changed()  # it says what the storage secret is called
            others = [one for kind, one in self._watched.items() if kind not in (_CONFIG, SECRETS)]
            for informer in others:
                parts.create_task(informer.run())
            parts.create_task(self._follow_secrets())
            await self._secrets_settled.wait()
            await asyncio.gather(*(one.wait_settled() for one in others))
            self._settled.set()
            for informer in (*others, self._config_map):
                if not informer.synced:
                    parts.create_task(self._come_late(informer))

    async def wait_settled(self) -> None:
        """Until each kind is known, or the API server has refused it."""
        await self._settled.wait()

    def use_secret(self, name: str) -> None:
        """What storage secrets are called."""
        if name != self._secret_name:
            self._secret_name = name
            self._watched[SECRETS] = self._secrets_informer()
            self._secret_renamed.set()

    async def _follow_secrets(self) -> None:
        """The informer of the storage secrets, and another one when they are called otherwise."""
        while True:
            informer = self._watched[SECRETS]
            self._secret_renamed.clear()
            async with asyncio.TaskGroup() as parts:
                works = (informer.run(), self._come_late(informer), self._settle(informer))
                tasks = [parts.create_task(work) for work in works]
                await self._secret_renamed.wait()
                for task in tasks:
                    task.cancel()

    async def _settle(self, informer: Informer) -> None:
        await informer.wait_settled()
        self._secrets_settled.set()

    async def _come_late(self, informer: Informer) -> None:
        await informer.wait_synced()
        if self._settled.is_set():
            log.info("%s can be read now", informer.resource)
            self._listener.all_known()

    def _make_informers(self) -> dict[Resource, Informer]:
        space = None if self._whole else self._own_namespace
        found = {
            kind: self._informer(kind, space)
            for kind in (INFERENCE_SERVICES, PREDICTORS, SERVING_RUNTIMES)
        }
        found[CLUSTER_SERVING_RUNTIMES] = self._informer(CLUSTER_SERVING_RUNTIMES, None)
        found[SECRETS] = self._secrets_informer()
        if self._whole:
            found[NAMESPACES] = self._informer(NAMESPACES, None, labels=ENABLED_SELECTOR)
        if self._workloads:
            for kind in OWNED:
                found[kind] = self._informer(kind, space, labels=OWNED_SELECTOR)
        # ConfigMaps are two things: ours, which carry the label, and the operator's own one.
        found[_CONFIG] = self._config_map
        return found

    def _secrets_informer(self) -> Informer:
        space = None if self._whole else self._own_namespace
        return self._informer(SECRETS, space, fields=f"metadata.name={self._secret_name}")

    def _informer(
        self, kind: Resource, space: str | None, *, labels: str = "", fields: str = ""
    ) -> Informer:
        return Informer(
            self._kube,
            kind,
            space,
            on_change=self._changed,
            label_selector=labels,
            field_selector=fields,
            on_back=self._on_back,
        )

    def _changed(self, kind: Resource, namespace: str, name: str) -> None:
        if self.resource(kind, namespace, name) is None:  # the next of that name is another one
            self._runtimes_read.pop((kind.kind, namespace, name), None)
        self._listener.changed(kind, namespace, name)

    # ---- what is known ------------------------------------------------------------------------

    def unknown(self) -> str:
        """Which kind cannot be read, and why; "" when all can."""
        for resource, informer in self._watched.items():
            if not informer.known:
                error = f": {informer.error}" if informer.error is not None else ""
                return f"{resource.plural} are not read yet{error}"
        return ""

    def config_map(self) -> Obj | None:
        return self._config_map.get(self._own_namespace, CONFIG_MAP)

    def service_count(self) -> int:
        return sum(len(self._watched[one].store) for one in SERVICE_KINDS)

    def names(self, kind: Resource, namespace: str) -> list[str]:
        return [name for space, name in self._watched[kind].store if space == namespace]

    def namespaces(self) -> set[str] | None:
        """Those with a mesh, and those where something of one is left; None: nobody knows."""
        if not self._whole:
            return {self._own_namespace}
        if not self.known(NAMESPACES):
            return None
        named = {name for _, name in self._watched[NAMESPACES].store}
        return named | {space for space in self._namespaces_seen() if self.is_left_in(space)}

    def _namespaces_seen(self) -> set[str]:
        kinds = (*SERVICE_KINDS, *OWNED)
        stores = [self._watched[kind].store for kind in kinds if kind in self._watched]
        return {space for store in stores for space, _ in store}

    def is_left_in(self, namespace: str) -> bool:
        """Whether something there waits for us to let go of it."""
        return bool(self.owned(namespace)) or any(
            FINALIZER in (one["metadata"].get("finalizers") or ())
            for one in self.resources(namespace)
        )

    def known(self, *kinds: Resource) -> bool:
        """Whether what is missing of these kinds does not exist."""
        return all(self._watched[kind].known for kind in kinds)

    def served(self, namespace: str) -> bool:
        """Whether it has a mesh; otherwise what is left of one is to go."""
        if not self._whole or not self.known(NAMESPACES):
            return True
        obj = self._watched[NAMESPACES].get("", namespace)
        return obj is not None and "deletionTimestamp" not in obj["metadata"]

    def writable(self, kind: Resource) -> bool:
        """Whether the server has this kind of owned object, and lets it be watched."""
        return kind in self._watched and self._watched[kind].synced

    def resource(self, kind: Resource, namespace: str, name: str) -> Obj | None:
        return self._watched[kind].get(namespace, name)

    def learn(self, kind: Resource, obj: Obj) -> None:
        self._watched[kind].learn(obj)

    def runtimes(self, namespace: str) -> list[RuntimeSource]:
        """Its own, then the cluster's whose name is not taken. One that cannot be read is told of
        by an event; as it was when it could be, it goes on."""
        own = [
            obj
            for (space, _), obj in self._watched[SERVING_RUNTIMES].store.items()
            if space == namespace
        ]
        names = {obj["metadata"]["name"] for obj in own}
        shared = [
            obj
            for (_, name), obj in self._watched[CLUSTER_SERVING_RUNTIMES].store.items()
            if name not in names
        ]
        found = [one for obj in (*own, *shared) if (one := self._read_runtime(obj)) is not None]
        return sorted(found, key=lambda one: (one.is_cluster_wide, one.name))

    def _read_runtime(self, obj: Obj) -> RuntimeSource | None:
        """Each version of a resource is read, and complained of, once."""
        metadata = obj["metadata"]
        key = (obj["kind"], metadata.get("namespace", ""), metadata["name"])
        version = metadata.get("resourceVersion", "")
        known = self._runtimes_read.get(key)
        if known is not None and known[0] == version:
            return known[1]
        source = known[1] if known is not None else None
        try:
            source = RuntimeSource.of(obj)
        except InvalidArgument as error:
            log.warning("%s %s: %s", obj["kind"], metadata["name"], error.message)
            self._events.emit(obj, "Warning", "InvalidRuntime", error.message)
        self._runtimes_read[key] = (version, source)
        return source

    def owned(self, namespace: str) -> list[Obj]:
        return [
            obj
            for resource in OWNED
            if (informer := self._watched.get(resource)) is not None
            for (space, _), obj in informer.store.items()
            if space == namespace
        ]

    def secret(self, namespace: str) -> Obj | None:
        return self._watched[SECRETS].get(namespace, self._secret_name)

    def storage(self, namespace: str) -> Mapping[str, Mapping[str, Any]]:
        return entries_of(self.secret(namespace))

    def resources(self, namespace: str) -> list[Obj]:
        return [
            obj
            for kind in SERVICE_KINDS
            for (space, _), obj in self._watched[kind].store.items()
            if space == namespace
        ]
