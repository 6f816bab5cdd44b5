"""(9) The controller against a real API server: 2,000 services at once, changes, and idleness.

The API server is the tests' own (kube-apiserver and an etcd), the mesh's etcd another one, the
controller a process of its own with no mesh behind: what is measured is the reconciler. Times are
absolute, because there is no other controller here to compare with: each row also tells what the
API server alone took for the same writes.
"""

from __future__ import annotations

import asyncio
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from pathlib import Path

from bench.cluster import etcd
from bench.effort import Effort
from bench.process import BenchError, Child, Unavailable, free_port
from bench.report import Report
from bench.scrape import sums
from bench.stats import percentile, spread
from mesh import registry
from mesh.core.types import CopyRecord, CopyState, InstanceRecord, InstanceState
from mesh.reconciler.kube import Kube
from mesh.reconciler.kube_resources import INFERENCE_SERVICES, SERVING_RUNTIMES, Obj
from mesh.store.api import Changes, Put
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_options import EtcdOptions

SERVICES = 2_000
CHANGES = 60
CREATES_AT_ONCE = 16
IDLE_S = 30.0
WAIT_S = 180.0
REGISTERED_S, MEMORY_MIB, CHANGE_S, STATUS_S, IDLE_SHARE = 60.0, 300.0, 1.0, 1.0, 0.02
INSTANCE = "pod-00000001"


def measure(report: Report, effort: Effort) -> None:
    try:
        from tests.kube_server import KubeNotFound, KubeServer
    except ImportError as error:
        raise Unavailable(f"the API server of the tests cannot be had: {error}") from error
    try:
        server = KubeServer()
    except KubeNotFound as error:
        raise Unavailable(str(error)) from error
    with server, tempfile.TemporaryDirectory(prefix="bench-") as name, etcd(Path(name)) as endpoint:
        server.install_crds()
        namespace = server.create_namespace()
        port = free_port()
        argv = [
            sys.executable, "-m", "mesh.cli", "controller", "--namespace", namespace,
            "--kubeconfig", str(server.kubeconfig("admin")), "--etcd", endpoint,
            "--no-workloads", "--metrics-port", str(port),
        ]  # fmt: skip
        with Child("controller", argv) as controller:
            controller.wait_for_port(port)
            bench = _Bench(report, effort, namespace, controller, port)
            asyncio.run(bench.run(server.kubeconfig("admin"), endpoint))


class _Bench:
    def __init__(
        self, report: Report, effort: Effort, namespace: str, controller: Child, metrics_port: int
    ) -> None:
        self.report = report
        self.services = effort.scaled(SERVICES, 5)
        self.changes = effort.scaled(CHANGES, 3)
        self.idle_s = max(1.0, IDLE_S * min(1.0, effort.scale))
        self.namespace = namespace
        self.controller = controller
        self.metrics_port = metrics_port

    async def run(self, kubeconfig: Path, endpoint: str) -> None:
        store = EtcdStore(EtcdOptions((endpoint,)), prefix="mesh", namespace=self.namespace)
        try:
            async with await Kube.connect(kubeconfig) as kube:
                await kube.create(SERVING_RUNTIMES, _runtime(self.namespace))
                await self._all_at_once(kube, store)
                await self._one_by_one(kube, store)
                await self._idle()
        finally:
            await store.close()
        memory = self.controller.peak_rss_bytes() / (1 << 20)
        self.report.figure(
            f"controller's peak memory with {self.services:,} services",
            spread([memory]), "at most", MEMORY_MIB, "MiB",
        )  # fmt: skip

    async def _all_at_once(self, kube: Kube, store: EtcdStore) -> None:
        gate = asyncio.Semaphore(CREATES_AT_ONCE)

        async def create(number: int) -> None:
            async with gate:
                await kube.create(INFERENCE_SERVICES, _service(f"m{number:05}", self.namespace))

        started, cpu_s = time.perf_counter(), self.controller.cpu_seconds()
        async with asyncio.timeout(WAIT_S):
            await asyncio.gather(*(create(number) for number in range(self.services)))
            created_s = time.perf_counter() - started
            while len((await store.range(registry.VMODELS_PREFIX)).items) < self.services:
                self.controller.check()
                await asyncio.sleep(0.05)
            registered_s = time.perf_counter() - started
            while await self._without_status(kube):
                self.controller.check()
                await asyncio.sleep(0.2)
            told_s = time.perf_counter() - started
        self.report.row(
            f"{self.services:,} InferenceServices at once",
            **{
                "created, s": created_s,
                "registered, s": registered_s,
                "status, s": told_s,
                "controller's CPU, s": self.controller.cpu_seconds() - cpu_s,
            },
        )
        self.report.figure(
            f"{self.services:,} services registered after",
            spread([registered_s]), "at most", REGISTERED_S, "s",
        )  # fmt: skip

    async def _without_status(self, kube: Kube) -> int:
        listing = await kube.list(INFERENCE_SERVICES, self.namespace)
        return sum("status" not in one for one in listing.items)

    async def _one_by_one(self, kube: Kube, store: EtcdStore) -> None:
        instance = InstanceRecord(
            INSTANCE, "127.0.0.1:1", InstanceState.READY, 1 << 40, model_types=("onnx",)
        )
        await store.put(registry.key_of(instance), registry.encode(instance))
        to_registry, to_status = [], []
        for number in range(self.changes):
            name = f"m{number:05}"
            async with asyncio.timeout(WAIT_S), _watching(store, name) as changed:
                patch = {"spec": {"predictor": {"model": {"storageUri": f"s3://new/{number}"}}}}
                await kube.patch(INFERENCE_SERVICES, self.namespace, name, patch)
                started = time.perf_counter()
                await changed()
                to_registry.append(time.perf_counter() - started)
            async with asyncio.timeout(WAIT_S):
                to_status.append(await self._loaded(kube, store, name))
        for what, times, most in (
            ("a changed service is in the registry after", to_registry, CHANGE_S),
            ("a loaded model is in the status after", to_status, STATUS_S),
        ):
            self.report.row(
                "one change at a time",
                what=what,
                **{"median, ms": spread([t * 1_000 for t in times]),
                   "p99, ms": percentile(times, 0.99) * 1_000},
            )  # fmt: skip
            self.report.figure(f"{what} (median)", spread(times), "at most", most, "s")

    async def _loaded(self, kube: Kube, store: EtcdStore, name: str) -> float:
        found = await store.get(registry.vmodel_key(name))
        assert found is not None
        alias = registry.decode_vmodel(name, found.value)
        listing = await kube.list(
            INFERENCE_SERVICES, self.namespace, field_selector=f"metadata.name={name}"
        )
        watch = kube.watch(
            INFERENCE_SERVICES,
            self.namespace,
            resource_version=listing.resource_version,
            field_selector=f"metadata.name={name}",
        )
        copy = CopyRecord(alias.target_model_id, INSTANCE, CopyState.LOADED, size_bytes=1)
        moved = replace(alias, active_model_id=alias.target_model_id, awaits_load=False)
        writes = [Put(registry.key_of(one), registry.encode(one)) for one in (copy, moved)]
        await store.txn([], writes)
        started = time.perf_counter()
        async with aclosing(watch) as events:
            async for event in events:
                if _is_ready(event.object):
                    return time.perf_counter() - started
        raise BenchError(f"the watch of {name} ended")

    async def _idle(self) -> None:
        """No API writes, and hardly any CPU, while nothing changes."""
        await asyncio.sleep(2.0)
        writes = sums(self.metrics_port)["mesh_controller_api_writes_total"]
        cpu_s, started = self.controller.cpu_seconds(), time.perf_counter()
        await asyncio.sleep(self.idle_s)
        share = (self.controller.cpu_seconds() - cpu_s) / (time.perf_counter() - started)
        written = sums(self.metrics_port)["mesh_controller_api_writes_total"] - writes
        self.report.figure(
            f"idle, with {self.services:,} services: share of a core",
            spread([share]), "at most", IDLE_SHARE, "",
        )  # fmt: skip
        self.report.figure(
            f"idle: API writes in {self.idle_s:.0f} s", spread([written]), "at most", 0.0, ""
        )


@asynccontextmanager
async def _watching(store: EtcdStore, name: str) -> AsyncIterator[Callable[[], Awaitable[None]]]:
    """Gives an awaitable: the alias has changed since."""
    watch = store.watch(registry.vmodel_key(name))
    await anext(aiter(watch))  # the snapshot

    async def changed() -> None:
        async for step in watch:
            if isinstance(step, Changes):
                return

    yield changed


def _is_ready(obj: Obj) -> bool:
    status = obj.get("status") or {}
    ready = any(
        one["type"] == "Ready" and one["status"] == "True" for one in status.get("conditions", ())
    )
    transition = (status.get("modelStatus") or {}).get("transitionStatus")
    return bool(ready and transition == "UpToDate")


def _service(name: str, namespace: str) -> Obj:
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
                    "modelFormat": {"name": "onnx"},
                    "storageUri": f"s3://models/{name}/model.onnx",
                }
            }
        },
    }


def _runtime(namespace: str) -> Obj:
    return {
        "apiVersion": SERVING_RUNTIMES.api_version,
        "kind": "ServingRuntime",
        "metadata": {"name": "mesh-1.x", "namespace": namespace},
        "spec": {
            "multiModel": True,
            "supportedModelFormats": [{"name": "onnx", "version": "1", "autoSelect": True}],
            "containers": [],
        },
    }
