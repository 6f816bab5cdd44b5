"""Feeds the plans: informers and registries tell what changed, the queue says whose turn it is.

Three kinds of work, each a key of one queue: a service (``ServiceKey``), the pods of a namespace
(``SpaceKey``), and a namespace's storage secret (``SecretKey``). What a key's object looks like is
read when its turn has come, never carried along: however often something changes meanwhile, it is
looked at once.

Nothing is decided before every informer and the namespace's mesh have been whole once. Who does not
lead keeps all of it warm and writes nothing; who comes to lead looks at everything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, assert_never

from mesh.core.errors import InvalidArgument
from mesh.metrics import ControllerMetrics
from mesh.reconciler.config import CONFIG_MAP, ControllerConfig, read_config
from mesh.reconciler.events import EventRecorder
from mesh.reconciler.informer import Informer
from mesh.reconciler.kube import ApiError, Kube
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
from mesh.reconciler.meshes import Mesh
from mesh.reconciler.plan import FINALIZER
from mesh.reconciler.services import SERVICE_KINDS, Services, is_ours
from mesh.reconciler.settings import ControllerSettings
from mesh.reconciler.spaces import Spaces
from mesh.reconciler.storage import StorageSecrets, entries_of
from mesh.reconciler.work_queue import Again, WorkQueue
from mesh.reconciler.workload import OWNED, OWNED_SELECTOR
from mesh.reconciler.workload_source import RuntimeSource
from mesh.store.api import KVStore

log = logging.getLogger(__name__)

# ModelMesh's label of the namespaces that it serves.
ENABLED_SELECTOR: Final = "modelmesh-enabled=true"
# After a key's namespace has no whole registry yet, it is looked at again so soon.
_SYNCING_S: Final = 1.0
# How models are used decides on pods; while a thousand of them load, not at each one.
_USAGE_S: Final = 0.2


@dataclass(frozen=True, slots=True)
class ServiceKey:
    """An InferenceService or a Predictor."""

    resource: Resource
    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.resource.kind} {self.namespace}/{self.name}"


@dataclass(frozen=True, slots=True)
class SpaceKey:
    """The routers and serving pods of a namespace."""

    namespace: str

    def __str__(self) -> str:
        return f"pods of {self.namespace}"


@dataclass(frozen=True, slots=True)
class SecretKey:
    """The storage secret of a namespace."""

    namespace: str

    def __str__(self) -> str:
        return f"storage secret of {self.namespace}"


WorkKey = ServiceKey | SpaceKey | SecretKey


class Controller:
    """``run()`` as a task, then ``close()``. ``leads`` is asked before each act; ``identity`` is
    this process's name in events; ``make_store`` opens a namespace's registry."""

    def __init__(
        self,
        settings: ControllerSettings,
        kube: Kube,
        *,
        identity: str,
        make_store: Callable[[str], KVStore],
        metrics: ControllerMetrics,
        leads: Callable[[], bool],
        now_ms: Callable[[], int],
    ) -> None:
        self.settings = settings
        self.config = settings.config
        self._own_namespace = settings.namespace or kube.namespace
        self._kube = kube
        self._make_store = make_store
        self._metrics = metrics
        self._leads = leads
        self._now_ms = now_ms
        self.meshes: dict[str, Mesh] = {}
        self._mesh_tasks: dict[str, asyncio.Task[None]] = {}
        self._config_said = ""
        self._runtimes_read: dict[tuple[str, str, str], tuple[str, RuntimeSource | None]] = {}
        self.queue: WorkQueue[WorkKey] = WorkQueue(
            self._handle, workers=settings.workers, name="controller"
        )
        self.events = EventRecorder(kube, component="mesh-controller", instance=identity)
        self._watched = self._make_informers()
        self._services = Services(
            kube,
            self,
            self.events,
            counted=lambda action: metrics.counter("actions", action),
            now_ms=now_ms,
        )
        self._spaces = Spaces(
            kube,
            self,
            self.events,
            counted=lambda action: metrics.counter("actions", action),
            now_ms=now_ms,
        )
        self._secrets = StorageSecrets(kube, folder_of=self._storage_folder)
        self._closing: set[asyncio.Task[None]] = set()
        self._secret_renamed = asyncio.Event()
        self._secrets_settled = asyncio.Event()
        self._started = False
        self._report()

    # ---- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. An error of a part is a defect, and ends it."""
        async with asyncio.TaskGroup() as parts:
            # It says what the storage secret is called.
            parts.create_task(self._config_map.run())
            await self._config_map.wait_settled()
            self._read_config()
            for resource, informer in self._watched.items():
                if resource not in (_CONFIG, SECRETS):
                    parts.create_task(informer.run())
            parts.create_task(self._follow_secrets())
            parts.create_task(self.events.run())
            await self._secrets_settled.wait()
            others = {kind: one for kind, one in self._watched.items() if kind != SECRETS}
            await asyncio.gather(*(one.wait_settled() for one in others.values()))
            self._started = True
            self._open_meshes()
            log.info("%d namespaces, %d services", len(self.meshes), self._service_count())
            parts.create_task(self.queue.run())
            parts.create_task(self._watch_meshes())
            for informer in others.values():
                if not informer.synced:
                    parts.create_task(self._come_late(informer))

    async def close(self) -> None:
        for namespace in list(self.meshes):
            self._close_mesh(namespace)
        await asyncio.gather(*self._closing)

    async def _come_late(self, informer: Informer) -> None:
        """What was refused at the start is to be had now: everything may look different."""
        await informer.wait_synced()
        if not self._started:
            return
        log.info("%s can be read now", informer.resource)
        self._open_meshes()
        self._all_changed()

    def not_ready(self) -> str:
        """Why this process is not ready; "" when it is, leading or not."""
        for resource, informer in self._watched.items():
            if not informer.known:
                error = f": {informer.error}" if informer.error is not None else ""
                return f"{resource.plural} are not read yet{error}"
        away = [namespace for namespace, mesh in self.meshes.items() if not mesh.synced]
        return f"the registry of {', '.join(sorted(away)[:3])} is not read yet" if away else ""

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

    def leading_changed(self, leads: bool) -> None:
        log.info("this controller %s", "leads" if leads else "leads no more")
        if leads:
            self._all_changed()

    # ---- what is known (the ports of Services and Spaces) ---------------------------------------

    def known(self, *kinds: Resource) -> bool:
        """Whether what is missing of these kinds does not exist."""
        return all(self._watched[kind].known for kind in kinds)

    def served(self, namespace: str) -> bool:
        """Whether it has a mesh; otherwise what is left of one is to go."""
        if not self.settings.all_namespaces or not self.known(NAMESPACES):
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
            self.events.emit(obj, "Warning", "InvalidRuntime", error.message)
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
        return self._watched[SECRETS].get(namespace, self.config.storage_secret)

    def storage(self, namespace: str) -> Mapping[str, Mapping[str, Any]]:
        return entries_of(self.secret(namespace))

    def resources(self, namespace: str) -> list[Obj]:
        return [
            obj
            for kind in SERVICE_KINDS
            for (space, _), obj in self._watched[kind].store.items()
            if space == namespace
        ]

    # ---- what changed -------------------------------------------------------------------------

    def _make_informers(self) -> dict[Resource, Informer]:
        whole = self.settings.all_namespaces
        namespace = None if whole else self._own_namespace
        found: dict[Resource, Informer] = {}

        def watch(
            resource: Resource, space: str | None = namespace, *, labels: str = "", fields: str = ""
        ) -> None:
            found[resource] = Informer(
                self._kube,
                resource,
                space,
                on_change=self._changed,
                label_selector=labels,
                field_selector=fields,
                on_back=self.queue.retry_failed,
            )

        watch(INFERENCE_SERVICES)
        watch(PREDICTORS)
        watch(SERVING_RUNTIMES)
        watch(CLUSTER_SERVING_RUNTIMES, None)
        found[SECRETS] = self._secrets_informer()
        if whole:
            watch(NAMESPACES, None, labels=ENABLED_SELECTOR)
        if self.settings.workloads:
            for resource in OWNED:
                watch(resource, labels=OWNED_SELECTOR)
        # ConfigMaps are two things: ours, which carry the label, and the operator's own one.
        self._config_map = Informer(
            self._kube,
            CONFIG_MAPS,
            self._own_namespace,
            on_change=lambda *_: self._read_config(),
            field_selector=f"metadata.name={CONFIG_MAP}",
        )
        found[_CONFIG] = self._config_map
        return found

    def _secrets_informer(self) -> Informer:
        return Informer(
            self._kube,
            SECRETS,
            None if self.settings.all_namespaces else self._own_namespace,
            on_change=self._changed,
            field_selector=f"metadata.name={self.config.storage_secret}",
            on_back=self.queue.retry_failed,
        )

    def _changed(self, resource: Resource, namespace: str, name: str) -> None:
        match resource:
            case _ if resource in SERVICE_KINDS:
                self._service_changed(resource, namespace, name)
            case _ if resource == SERVING_RUNTIMES:
                self._space_changed(namespace)
            case _ if resource == CLUSTER_SERVING_RUNTIMES:
                for space in self.meshes:
                    self._space_changed(space)
            case _ if resource == SECRETS:
                self.queue.add(SecretKey(namespace))
                self._space_changed(namespace)
            case _ if resource == NAMESPACES:
                if self._started:
                    self._open_meshes()
                    self._mesh_changed(name)
            case _:
                self.queue.add(SpaceKey(namespace))

    def _service_changed(self, resource: Resource, namespace: str, name: str) -> None:
        if namespace not in self.meshes:
            if self._started and self._is_left_in(namespace):
                self._open_meshes()
            return
        self.queue.add(ServiceKey(resource, namespace, name))

    def _space_changed(self, namespace: str) -> None:
        """Its pods, and every service: another runtime or secret may be what it lacked."""
        self.queue.add(SpaceKey(namespace))
        self.names_changed(namespace, None)

    def _all_changed(self) -> None:
        for namespace in self.meshes:
            self._mesh_changed(namespace)

    def _mesh_changed(self, namespace: str) -> None:
        """All of a namespace."""
        if namespace in self.meshes:
            self.queue.add(SecretKey(namespace))
            self._space_changed(namespace)

    # As the listener of the meshes.

    def names_changed(self, namespace: str, names: Collection[str] | None, /) -> None:
        mesh = self.meshes.get(namespace)
        if names is None:
            for kind in SERVICE_KINDS:
                for space, name in self._watched[kind].store:
                    if space == namespace:
                        self.queue.add(ServiceKey(kind, namespace, name))
            names = self._services.orphans(mesh, self.config)
        for name in names:
            for kind in SERVICE_KINDS:
                known = (namespace, name) in self._watched[kind].store
                if known or is_ours(mesh, kind, name):
                    self.queue.add(ServiceKey(kind, namespace, name))

    def demand_changed(self, namespace: str, /) -> None:
        self.queue.add(SpaceKey(namespace))

    def instances_changed(self, namespace: str, /) -> None:
        self.queue.add(SpaceKey(namespace))

    def usage_changed(self, namespace: str, /) -> None:
        if self.settings.workloads:
            self.queue.add_after(SpaceKey(namespace), _USAGE_S)

    # ---- namespaces ---------------------------------------------------------------------------

    def _open_meshes(self) -> None:
        """Those that are served, and those where something of ours is left, which is to go."""
        wanted = {self._own_namespace}
        if self.settings.all_namespaces:
            if not self.known(NAMESPACES):
                return  # it would look as if none were served
            wanted = {name for _, name in self._watched[NAMESPACES].store}
            wanted |= {space for space in self._namespaces_seen() if self._is_left_in(space)}
        for namespace in wanted - self.meshes.keys():
            mesh = Mesh(namespace, self._make_store(namespace), self, now_ms=self._now_ms)
            self.meshes[namespace] = mesh
            task = asyncio.get_running_loop().create_task(mesh.run(), name=f"mesh {namespace}")
            self._mesh_tasks[namespace] = task
            self._mesh_changed(namespace)
        for namespace in self.meshes.keys() - wanted:
            self._mesh_changed(namespace)

    def _namespaces_seen(self) -> set[str]:
        kinds = (*SERVICE_KINDS, *OWNED)
        stores = [self._watched[kind].store for kind in kinds if kind in self._watched]
        return {space for store in stores for space, _ in store}

    def _is_left_in(self, namespace: str) -> bool:
        """Whether something there waits for us to let go of it."""
        return bool(self.owned(namespace)) or any(
            FINALIZER in (one["metadata"].get("finalizers") or ())
            for one in self.resources(namespace)
        )

    def _close_if_left(self, namespace: str) -> None:
        mesh = self.meshes.get(namespace)
        if mesh is None or self.served(namespace) or not mesh.synced:
            return
        if not (self._is_left_in(namespace) or self._services.orphans(mesh, self.config)):
            log.info("namespace %s is not served any more", namespace)
            try:
                self._secrets.forget(namespace)
            except OSError as error:
                log.error("namespace %s: its storage secret's files: %s", namespace, error)
            self._close_mesh(namespace)

    def _close_mesh(self, namespace: str) -> None:
        mesh, running = self.meshes.pop(namespace), self._mesh_tasks.pop(namespace)
        self._spaces.forget(namespace)
        task = asyncio.get_running_loop().create_task(_close(mesh, running))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _watch_meshes(self) -> None:
        """Ends with the error of a mesh that has ended, which none should."""
        while True:
            tasks = set(self._mesh_tasks.values())
            if not tasks:
                await asyncio.sleep(_SYNCING_S)
                continue
            done, _ = await asyncio.wait(
                tasks, timeout=_SYNCING_S, return_when=asyncio.FIRST_EXCEPTION
            )
            for task in done:
                if task in self._mesh_tasks.values():
                    task.result()
                    raise RuntimeError(f"{task.get_name()} has ended")

    def _storage_folder(self, namespace: str) -> Path | None:
        folder = self.settings.storage_config_dir
        return folder / namespace if folder and self.settings.all_namespaces else folder

    # ---- configuration ------------------------------------------------------------------------

    def _read_config(self) -> None:
        """The last good one counts while the ConfigMap is wrong."""
        obj = self._config_map.get(self._own_namespace, CONFIG_MAP)
        said = ""
        try:
            config, warnings = read_config(
                obj.get("data") or {} if obj is not None else None, self.settings.config
            )
        except InvalidArgument as error:
            said = error.message
            log.error("%s; the last good configuration counts", error.message)
            if obj is not None and said != self._config_said:
                self.events.emit(obj, "Warning", "InvalidConfiguration", error.message)
        else:
            for warning in warnings:
                log.warning("%s", warning)
            self._use_config(config)
        self._config_said = said

    def _use_config(self, config: ControllerConfig) -> None:
        if config != self.config:
            log.info("the configuration has changed")
            renamed = config.storage_secret != self.config.storage_secret
            self.config = config
            if renamed:
                self._watched[SECRETS] = self._secrets_informer()
                self._secret_renamed.set()
            self._all_changed()

    # ---- work ---------------------------------------------------------------------------------

    async def _handle(self, key: WorkKey) -> Again | None:
        mesh = self.meshes.get(key.namespace)
        if mesh is None:
            return None
        if not self._leads():
            self._close_if_left(key.namespace)
            return None
        kind = type(key).__name__.removesuffix("Key").lower()
        outcome = "failed"
        try:
            again = await self._work(key, mesh)
            outcome = "done"
        except ApiError as error:
            outcome = error.reason or "refused"
            raise
        finally:
            self._metrics.counter("reconciles", kind, outcome)
        self._close_if_left(key.namespace)
        return again

    async def _work(self, key: WorkKey, mesh: Mesh) -> Again | None:
        match key:
            case ServiceKey():
                if not mesh.settled:
                    return None  # its first news has everything looked at
                return await self._services.reconcile(
                    mesh, self.config, key.resource, key.namespace, key.name
                )
            case SpaceKey():
                if not self.settings.workloads:
                    return None
                # Without all of its runtimes it would look as if their pods were not wanted.
                if not (mesh.synced and self.known(SERVING_RUNTIMES, CLUSTER_SERVING_RUNTIMES)):
                    return Again(_SYNCING_S)
                return await self._spaces.reconcile(mesh, self.config)
            case SecretKey():
                if not (self.known(SECRETS) and self.served(key.namespace)):
                    return None
                return await self._secrets.reconcile(mesh, self.secret(key.namespace))
            case _:
                assert_never(key)

    # ---- metrics ------------------------------------------------------------------------------

    def _service_count(self) -> int:
        return sum(len(self._watched[one].store) for one in SERVICE_KINDS)

    def _report(self) -> None:
        metrics = self._metrics
        metrics.gauge_source("api_writes", lambda: self._kube.writes_total)
        metrics.gauge_source("queue", lambda: len(self.queue.schedule))
        metrics.gauge_source("backing_off", lambda: self.queue.schedule.delayed)
        metrics.gauge_source("services", self._service_count)
        metrics.gauge_source("meshes", lambda: len(self.meshes))
        metrics.gauge_source("controller_leader", lambda: float(self._leads()))
        metrics.gauge_source(
            "store_connected", lambda: float(all(m.reachable for m in self.meshes.values()))
        )


async def _close(mesh: Mesh, running: asyncio.Task[None]) -> None:
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await mesh.close()


# The operator's ConfigMap beside the controller's own ones, which are another informer.
_CONFIG: Final = Resource("", "v1", "configmaps", "ConfigMap (configuration)")
