"""A whole controller in this process, against a real API server and a real etcd.

The mesh behind it is played: ``Script`` writes what routers and instances would write into the
registry, so that a test says when a model loads and when it fails. What a test reads, it reads
from the API server or from etcd, never from the controller.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from mesh import registry
from mesh.core.types import (
    CopyRecord,
    CopyState,
    FailureRecord,
    InstanceRecord,
    InstanceState,
    VModelRecord,
)
from mesh.metrics import ControllerMetrics
from mesh.reconciler.config import ControllerConfig
from mesh.reconciler.controller import Controller
from mesh.reconciler.kube import ApiNotFound, Kube, Limits
from mesh.reconciler.kube_resources import (
    EVENTS,
    INFERENCE_SERVICES,
    SERVING_RUNTIMES,
    Obj,
    Resource,
)
from mesh.reconciler.settings import ControllerSettings
from mesh.store.api import Delete
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_options import EtcdOptions
from tests.etcd_server import EtcdServer
from tests.kube_server import KubeServer

WAIT_S = 60.0


def now_ms() -> int:
    return time.time_ns() // 1_000_000


def isvc(
    name: str,
    namespace: str,
    *,
    uri: str = "s3://models/one",
    model_format: str = "onnx",
    **model: Any,
) -> Obj:
    """An InferenceService in ModelMesh's mode; ``model`` are more fields of predictor.model."""
    return {
        "apiVersion": INFERENCE_SERVICES.api_version,
        "kind": "InferenceService",
        "metadata": {
            "name": name,
            "namespace": namespace,
            "annotations": {"serving.kserve.io/deploymentMode": "ModelMesh"},
        },
        "spec": {
            "predictor": {
                "model": {
                    "modelFormat": {"name": model_format},
                    **({"storageUri": uri} if uri else {}),
                    **model,
                }
            }
        },
    }


def runtime(name: str, namespace: str, *formats: str, **spec: Any) -> Obj:
    """A ServingRuntime whose models run in the mesh's own pods."""
    return {
        "apiVersion": SERVING_RUNTIMES.api_version,
        "kind": "ServingRuntime",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "multiModel": True,
            "supportedModelFormats": [
                {"name": one, "version": "1", "autoSelect": True} for one in formats or ("onnx",)
            ],
            "containers": [],
            **spec,
        },
    }


class Script:
    """Routers and instances, played: one instance that runs every format."""

    def __init__(self, store: EtcdStore) -> None:
        self.store = store

    async def instance(
        self, instance_id: str = "pod-00000001", *labels: str, formats: tuple[str, ...] = ("onnx",)
    ) -> None:
        record = InstanceRecord(
            instance_id,
            "127.0.0.1:1",
            InstanceState.READY,
            1 << 30,
            model_types=formats,
            labels=labels,
        )
        await self.store.put(registry.instance_key(instance_id), registry.encode(record))

    async def alias(self, name: str) -> VModelRecord | None:
        found = await self.store.get(registry.vmodel_key(name))
        return registry.decode_vmodel(name, found.value) if found is not None else None

    async def aliases(self) -> dict[str, VModelRecord]:
        items = (await self.store.range(registry.VMODELS_PREFIX)).items
        names = [registry.unescape(i.key.removeprefix(registry.VMODELS_PREFIX)) for i in items]
        return {
            name: registry.decode_vmodel(name, item.value)
            for name, item in zip(names, items, strict=True)
        }

    async def models(self) -> set[str]:
        items = (await self.store.range(registry.MODELS_PREFIX)).items
        return {registry.unescape(i.key.removeprefix(registry.MODELS_PREFIX)) for i in items}

    async def registered(self, name: str, *, besides: str = "") -> VModelRecord:
        """Its alias, once it has one whose target is another than ``besides``."""

        async def look() -> VModelRecord | None:
            alias = await self.alias(name)
            return alias if alias is not None and alias.target_model_id != besides else None

        return await until(look)

    async def load(self, name: str, instance_id: str = "pod-00000001") -> None:
        """The target is loaded, and the leader moves the alias to it."""
        alias = await self.alias(name)
        assert alias is not None
        copy = CopyRecord(alias.target_model_id, instance_id, CopyState.LOADED, size_bytes=10)
        await self.store.put(registry.key_of(copy), registry.encode(copy))
        moved = replace(alias, active_model_id=alias.target_model_id, awaits_load=False, failed="")
        await self.store.put(registry.key_of(moved), registry.encode(moved))

    async def fail(
        self, name: str, message: str = "the file is truncated", instance_id: str = "pod-00000001"
    ) -> None:
        """The target did not load, and the leader has marked the alias."""
        alias = await self.alias(name)
        assert alias is not None
        failure = FailureRecord(
            alias.target_model_id,
            instance_id,
            "FAILED_PRECONDITION",
            message,
            now_ms(),
            now_ms() + 900_000,
        )
        await self.store.put(registry.key_of(failure), registry.encode(failure))
        marked = replace(alias, failed=message)
        await self.store.put(registry.key_of(marked), registry.encode(marked))

    async def clear(self) -> None:
        await self.store.txn([], [Delete("", prefix=True)])


async def until(look: Callable[[], Any], *, what: str = "") -> Any:
    """What ``look`` (a coroutine function) returns once that is true; fails after ``WAIT_S``."""
    seen: Any = None
    try:
        async with asyncio.timeout(WAIT_S):
            while True:
                seen = await look()
                if seen:
                    return seen
                await asyncio.sleep(0.02)
    except TimeoutError:
        raise AssertionError(f"waited in vain for {what or look}; last seen: {seen!r}") from None


class Rig:
    """``client`` is the test's own; the controller has another one."""

    def __init__(
        self, server: KubeServer, etcd: EtcdServer, namespace: str, client: Kube, store: EtcdStore
    ) -> None:
        self.server = server
        self.etcd = etcd
        self.namespace = namespace
        self.client = client
        self.mesh = Script(store)
        self.controller: Controller | None = None
        self._controller_client: Kube | None = None
        self._task: asyncio.Task[None] | None = None

    # ---- the controller -----------------------------------------------------------------------

    async def start(
        self,
        *,
        kubeconfig: Path | None = None,
        config: ControllerConfig | None = None,
        leads: Callable[[], bool] = lambda: True,
        limits: Limits | None = None,
        **settings: Any,
    ) -> Controller:
        assert self.controller is None
        known: dict[str, Any] = {"namespace": self.namespace, "workloads": False, **settings}
        if known.get("all_namespaces"):
            del known["namespace"]
        chosen = ControllerSettings(
            etcd_endpoints=(self.etcd.endpoint,), config=config or ControllerConfig(), **known
        )
        kube = await Kube.connect(kubeconfig or self.server.kubeconfig("admin"), limits=limits)
        self._controller_client = kube
        self.controller = Controller(
            chosen,
            kube,
            identity="test",
            make_store=self.store_of,
            metrics=ControllerMetrics(),
            leads=leads,
            now_ms=now_ms,
        )
        self._task = asyncio.create_task(self.controller.run())
        return self.controller

    async def stop(self) -> None:
        """Cut it off wherever it is."""
        if self.controller is None:
            return
        assert self._task is not None and self._controller_client is not None
        self._task.cancel()
        result = (await asyncio.gather(self._task, return_exceptions=True))[0]
        await self.controller.close()
        await self._controller_client.close()
        self.controller = self._task = self._controller_client = None
        assert isinstance(result, asyncio.CancelledError), result

    def store_of(self, namespace: str) -> EtcdStore:
        options = EtcdOptions((self.etcd.endpoint,))
        return EtcdStore(options, prefix="mesh", namespace=namespace)

    @property
    def calls(self) -> Counter[tuple[str, str, int]]:
        """The controller's calls by verb, plural and HTTP status; 0 for no answer."""
        assert self._controller_client is not None
        return self._controller_client.calls_total

    async def idle(self) -> None:
        """Until the controller has nothing to do."""
        controller = self.controller
        assert controller is not None

        async def look() -> bool:
            return len(controller.queue.schedule) == 0

        await until(look, what="an empty queue")

    @property
    def writes(self) -> int:
        """Writes of the controller at the API server so far."""
        assert self._controller_client is not None
        return self._controller_client.writes_total

    # ---- the cluster --------------------------------------------------------------------------

    async def apply(self, obj: Obj) -> Obj:
        """As kubectl apply would: made, or its spec replaced."""
        resource = RESOURCES[obj["kind"]]
        metadata = obj["metadata"]
        try:
            there = await self.client.get(resource, metadata.get("namespace"), metadata["name"])
        except ApiNotFound:
            return await self.client.create(resource, obj)
        patch = {key: value for key, value in obj.items() if key not in ("apiVersion", "kind")}
        return await self.client.patch(
            resource, metadata.get("namespace"), there["metadata"]["name"], patch
        )

    async def get(self, name: str, resource: Resource = INFERENCE_SERVICES) -> Obj:
        return await self.client.get(resource, self.namespace, name)

    async def status(
        self,
        name: str,
        holds: Callable[[Obj], object],
        resource: Resource = INFERENCE_SERVICES,
    ) -> Obj:
        """The status, once it is so."""

        async def look() -> Obj | None:
            status: Obj = (await self.get(name, resource)).get("status") or {}
            seen.append(status)
            return status if holds(status) else None

        seen: list[Obj] = []
        try:
            found: Obj = await until(look, what=f"the status of {name}")
        except AssertionError as error:
            raise AssertionError(f"{error}; the status is {seen[-1]}") from None
        return found

    async def ready(self, name: str) -> Obj:
        return await self.status(name, lambda s: condition(s, "Ready").get("status") == "True")

    async def gone(self, name: str, resource: Resource = INFERENCE_SERVICES) -> None:
        async def look() -> bool:
            with contextlib.suppress(ApiNotFound):
                await self.get(name, resource)
                return False
            return True

        await until(look, what=f"{name} to go")

    async def event(self, name: str, reason: str) -> Obj:
        """The event on an object, once there is one."""

        async def look() -> Obj | None:
            selector = f"involvedObject.name={name},reason={reason}"
            found = await self.client.list(EVENTS, self.namespace, field_selector=selector)
            return found.items[0] if found.items else None

        found: Obj = await until(look, what=f"an event {reason} on {name}")
        return found


def condition(status: Obj, kind: str) -> Obj:
    found: list[Obj] = [one for one in status.get("conditions") or () if one["type"] == kind]
    return found[0] if found else {}


RESOURCES: dict[str, Resource] = {}


def _fill() -> None:
    from mesh.reconciler import kube_resources

    for value in vars(kube_resources).values():
        if isinstance(value, Resource):
            RESOURCES[value.kind] = value


_fill()


@contextlib.asynccontextmanager
async def rig_of(server: KubeServer, etcd: EtcdServer, namespace: str) -> AsyncIterator[Rig]:
    store = EtcdStore(EtcdOptions((etcd.endpoint,)), prefix="mesh", namespace=namespace)
    async with await Kube.connect(server.kubeconfig("admin")) as client:
        rig = Rig(server, etcd, namespace, client, store)
        try:
            yield rig
        finally:
            await rig.stop()
            await store.close()
