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
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Final, assert_never

from mesh.core.errors import InvalidArgument
from mesh.metrics import ControllerMetrics
from mesh.reconciler.cluster import Cluster
from mesh.reconciler.config import ControllerConfig, read_config
from mesh.reconciler.events import EventRecorder
from mesh.reconciler.kube import ApiError, Kube
from mesh.reconciler.kube_resources import (
    CLUSTER_SERVING_RUNTIMES,
    NAMESPACES,
    SECRETS,
    SERVING_RUNTIMES,
    Resource,
)
from mesh.reconciler.meshes import Mesh
from mesh.reconciler.services import SERVICE_KINDS, Services, is_ours
from mesh.reconciler.settings import ControllerSettings
from mesh.reconciler.spaces import Spaces
from mesh.reconciler.storage import StorageSecrets
from mesh.reconciler.work_queue import Again, WorkQueue
from mesh.store.api import KVStore

log = logging.getLogger(__name__)

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
        self._kube = kube
        self._make_store = make_store
        self._metrics = metrics
        self._leads = leads
        self._now_ms = now_ms
        self.meshes: dict[str, Mesh] = {}
        self._mesh_tasks: dict[str, asyncio.Task[None]] = {}
        self._config_said = ""
        self.queue: WorkQueue[WorkKey] = WorkQueue(
            self._handle, workers=settings.workers, name="controller"
        )
        self.events = EventRecorder(kube, component="mesh-controller", instance=identity)
        self.cluster = Cluster(settings, kube, self.events, self, self.queue.retry_failed)
        self._services = Services(
            kube,
            self.cluster,
            self.events,
            counted=lambda action: metrics.counter("actions", action),
            now_ms=now_ms,
        )
        self._spaces = Spaces(
            kube,
            self.cluster,
            self.events,
            counted=lambda action: metrics.counter("actions", action),
            now_ms=now_ms,
        )
        self._secrets = StorageSecrets(kube, folder_of=self._storage_folder)
        self._closing: set[asyncio.Task[None]] = set()
        self._started = False
        self._report()

    # ---- life ---------------------------------------------------------------------------------

    async def run(self) -> None:
        """Until cancelled. An error of a part is a defect, and ends it."""
        async with asyncio.TaskGroup() as parts:
            parts.create_task(self.cluster.run())
            parts.create_task(self.events.run())
            await self.cluster.wait_settled()
            self._started = True
            self._open_meshes()
            services = self.cluster.service_count()
            log.info("%d namespaces, %d services", len(self.meshes), services)
            parts.create_task(self.queue.run())
            parts.create_task(self._watch_meshes())

    async def close(self) -> None:
        for namespace in list(self.meshes):
            self._close_mesh(namespace)
        await asyncio.gather(*self._closing)

    def not_ready(self) -> str:
        """Why this process is not ready; "" when it is, leading or not."""
        if unknown := self.cluster.unknown():
            return unknown
        away = [namespace for namespace, mesh in self.meshes.items() if not mesh.synced]
        return f"the registry of {', '.join(sorted(away)[:3])} is not read yet" if away else ""

    def leading_changed(self, leads: bool) -> None:
        log.info("this controller %s", "leads" if leads else "leads no more")
        if leads:
            self._all_changed()

    # ---- what changed -------------------------------------------------------------------------

    # As the listener of the cluster.

    def all_known(self) -> None:
        """What was refused at the start is to be had now: everything may look different."""
        if self._started:
            self._open_meshes()
            self._all_changed()

    def config_changed(self) -> None:
        self._read_config()

    def changed(self, resource: Resource, namespace: str, name: str) -> None:
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
            if self._started and self.cluster.is_left_in(namespace):
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
                for name in self.cluster.names(kind, namespace):
                    self.queue.add(ServiceKey(kind, namespace, name))
            names = self._services.orphans(mesh, self.config)
        for name in names:
            for kind in SERVICE_KINDS:
                known = self.cluster.resource(kind, namespace, name) is not None
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
        wanted = self.cluster.namespaces()
        if wanted is None:
            return  # it would look as if none were served
        for namespace in wanted - self.meshes.keys():
            mesh = Mesh(namespace, self._make_store(namespace), self, now_ms=self._now_ms)
            self.meshes[namespace] = mesh
            task = asyncio.get_running_loop().create_task(mesh.run(), name=f"mesh {namespace}")
            self._mesh_tasks[namespace] = task
            self._mesh_changed(namespace)
        for namespace in self.meshes.keys() - wanted:
            self._mesh_changed(namespace)

    def _close_if_left(self, namespace: str) -> None:
        mesh = self.meshes.get(namespace)
        if mesh is None or self.cluster.served(namespace) or not mesh.synced:
            return
        if not (self.cluster.is_left_in(namespace) or self._services.orphans(mesh, self.config)):
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
        obj = self.cluster.config_map()
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
            self.config = config
            self.cluster.use_secret(config.storage_secret)
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
                if not (
                    mesh.synced and self.cluster.known(SERVING_RUNTIMES, CLUSTER_SERVING_RUNTIMES)
                ):
                    return Again(_SYNCING_S)
                return await self._spaces.reconcile(mesh, self.config)
            case SecretKey():
                if not (self.cluster.known(SECRETS) and self.cluster.served(key.namespace)):
                    return None
                return await self._secrets.reconcile(mesh, self.cluster.secret(key.namespace))
            case _:
                assert_never(key)

    # ---- metrics ------------------------------------------------------------------------------

    def _report(self) -> None:
        metrics = self._metrics
        metrics.gauge_source("api_writes", lambda: self._kube.writes_total)
        metrics.gauge_source("queue", lambda: len(self.queue.schedule))
        metrics.gauge_source("backing_off", lambda: self.queue.schedule.delayed)
        metrics.gauge_source("services", self.cluster.service_count)
        metrics.gauge_source("meshes", lambda: len(self.meshes))
        metrics.gauge_source("controller_leader", lambda: float(self._leads()))
        metrics.gauge_source(
            "store_connected", lambda: float(all(m.reachable for m in self.meshes.values()))
        )


async def _close(mesh: Mesh, running: asyncio.Task[None]) -> None:
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    await mesh.close()
