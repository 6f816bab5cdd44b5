"""Sources and runtimes whose faults are scripted, and a whole instance on a store in memory."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from mesh import registry
from mesh.artifacts import Artifact, ArtifactRequest
from mesh.core.policy import Policy
from mesh.core.types import ModelRecord
from mesh.instance.instance import Instance
from mesh.instance.settings import InstanceSettings
from mesh.runtimes.api import Array, ModelMetadata, ModelSpec, Tensor, TensorSpec
from mesh.store.memory import MemoryStore
from puller.settings import PullerSettings

MIB = 1 << 20
WAIT_S = 60.0


async def until(condition: Callable[[], object], what: str = "") -> None:
    """Let the loop run until ``condition()``; fails after a while with ``what``."""
    async with asyncio.timeout(WAIT_S):
        while not condition():  # noqa: ASYNC110 - what it waits for has no event
            await asyncio.sleep(0.002)


class FakeSource:
    """Fetches at once unless told otherwise for a model."""

    def __init__(self) -> None:
        self.fetched: list[str] = []
        self.held: dict[str, int] = {}
        self.gates: dict[str, asyncio.Event] = {}
        self.faults: dict[str, list[Exception]] = {}
        self.release_faults: dict[str, list[Exception]] = {}
        self.cancelled: list[str] = []

    async def fetch(
        self,
        request: ArtifactRequest,
        progress: Callable[[int, int | None], None] | None = None,
    ) -> Artifact:
        name = request.model_id
        self.fetched.append(name)
        if progress is not None:
            progress(1, 2)
        try:
            if name in self.gates:
                await self.gates[name].wait()
        except asyncio.CancelledError:
            self.cancelled.append(name)
            raise
        if self.faults.get(name):
            raise self.faults[name].pop(0)
        self.held[name] = self.held.get(name, 0) + 1
        return Artifact(Path("/nowhere") / name, 1, f"fake://{name}", cached=False)

    def release(self, artifact: Artifact) -> None:
        name = artifact.path.name
        if self.release_faults.get(name):
            raise self.release_faults[name].pop(0)
        self.held[name] -= 1

    async def close(self) -> None:
        for gate in self.gates.values():
            gate.set()


class FakeModel:
    """Answers the doubled input. ``entered`` counts calls; ``gate`` holds them inside."""

    def __init__(self, runtime: FakeRuntime, spec: ModelSpec, size_bytes: int) -> None:
        self.runtime = runtime
        self.spec = spec
        self.size_bytes = size_bytes
        self.metadata = ModelMetadata(
            "fake", ("1",), (TensorSpec("x", "FP32", (-1,)),), (TensorSpec("y", "FP32", (-1,)),)
        )

    def infer(
        self, inputs: Mapping[str, Array], outputs: Sequence[str], parameters: Mapping[str, Any]
    ) -> list[Tensor]:
        runtime, name = self.runtime, self.spec.model_id
        with runtime.lock:
            runtime.inside[name] = runtime.inside.get(name, 0) + 1
            runtime.most_inside[name] = max(runtime.most_inside.get(name, 0), runtime.inside[name])
            runtime.calls.append((name, threading.current_thread().name))
        gate = runtime.infer_gates.get(name)
        if gate is not None:
            assert gate.wait(WAIT_S)
        with runtime.lock:
            runtime.inside[name] -= 1
        if runtime.infer_faults.get(name):
            raise runtime.infer_faults[name].pop(0)
        return [Tensor("y", "FP32", np.asarray(inputs["x"] * 2, dtype=np.float32))]

    def unload(self) -> None:
        runtime, name = self.runtime, self.spec.model_id
        gate = runtime.unload_gates.get(name)
        if gate is not None:
            assert gate.wait(WAIT_S)
        with runtime.lock:
            assert not runtime.inside.get(name), "unloaded with requests inside"
            runtime.held_bytes -= self.size_bytes
            runtime.unloaded.append(name)
        if runtime.unload_faults.get(name):
            raise runtime.unload_faults[name].pop(0)


class FakeRuntime:
    """``sizes``: (predicted, measured) bytes of a model; (MiB, MiB) where not given."""

    model_types = ("fake",)

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.sizes: dict[str, tuple[int, int]] = {}
        self.default_size = (MIB, MIB)
        self.load_gates: dict[str, threading.Event] = {}
        self.load_faults: dict[str, list[Exception]] = {}
        self.infer_gates: dict[str, threading.Event] = {}
        self.infer_faults: dict[str, list[Exception]] = {}
        self.unload_gates: dict[str, threading.Event] = {}
        self.unload_faults: dict[str, list[Exception]] = {}
        self.inside: dict[str, int] = {}
        self.most_inside: dict[str, int] = {}
        self.calls: list[tuple[str, str]] = []
        self.loading: list[str] = []
        self.loaded: list[str] = []
        self.unloaded: list[str] = []
        self.held_bytes = 0
        self.most_held_bytes = 0

    def runtime_for(self, model_type: str) -> FakeRuntime:
        return self

    def predict_size_bytes(self, spec: ModelSpec) -> int:
        return self.sizes.get(spec.model_id, self.default_size)[0]

    def load(self, spec: ModelSpec) -> FakeModel:
        name = spec.model_id
        size = self.sizes.get(name, self.default_size)[1]
        with self.lock:
            self.loading.append(name)
            self.held_bytes += size
            self.most_held_bytes = max(self.most_held_bytes, self.held_bytes)
        gate = self.load_gates.get(name)
        if gate is not None:
            assert gate.wait(WAIT_S)
        if self.load_faults.get(name):
            with self.lock:
                self.held_bytes -= size
            raise self.load_faults[name].pop(0)
        with self.lock:
            self.loaded.append(name)
        return FakeModel(self, spec, size)

    def open_all(self) -> None:
        for gates in (self.load_gates, self.infer_gates, self.unload_gates):
            for gate in gates.values():
                gate.set()


class Rig:
    """An instance on a store in memory, with fakes behind it."""

    def __init__(self, tmp_path: Path, store: MemoryStore | None = None, **settings: Any) -> None:
        self.store = store or MemoryStore()
        self.server = self.store.server
        self.source = FakeSource()
        self.runtime = FakeRuntime()
        self.policy: Policy = settings.pop("policy", Policy())
        capacity = settings.pop("capacity_bytes", 10 * MIB)
        drain_timeout_ms = settings.pop("drain_timeout_ms", 20_000)
        self.settings = InstanceSettings(
            puller=PullerSettings(cache_dir=tmp_path),
            metrics_port=None,
            capacity_bytes=capacity,
            drain_notice_ms=0,
            drain_timeout_ms=drain_timeout_ms,
            policy=self.policy,
            **settings,
        )
        self.instance = self.make()

    def make(self) -> Instance:
        return Instance(self.settings, self.store, self.source, self.runtime)

    @property
    def pod(self):
        return self.instance.pod

    def register(self, model_id: str, **fields: Any) -> ModelRecord:
        record = ModelRecord(model_id, "fake", **fields)
        from mesh.store.api import Put

        self.server.apply([Put(registry.key_of(record), registry.encode(record))])
        return record

    def unregister(self, model_id: str) -> None:
        from mesh.store.api import Delete

        self.server.apply([Delete(registry.model_key(model_id))])

    def copy(self, model_id: str, instance_id: str = ""):
        """The copy's record in the store, or None."""
        key = registry.copy_key(model_id, instance_id or self.instance.instance_id)
        item = self.server.get(key)
        return None if item is None else registry.decode(key, item.value)

    def failure(self, model_id: str):
        key = registry.failure_key(model_id, self.instance.instance_id)
        item = self.server.get(key)
        return None if item is None else registry.decode(key, item.value)

    def record(self):
        key = registry.instance_key(self.instance.instance_id)
        item = self.server.get(key)
        return None if item is None else registry.decode(key, item.value)

    async def start(self) -> None:
        await self.instance.start()
        async with asyncio.timeout(WAIT_S):
            await self.instance.membership.joined.wait()

    async def load(self, model_id: str, **wish: Any):
        from mesh.instance.flights import Wish

        wish.setdefault("revision", self.server.revision)
        async with asyncio.timeout(WAIT_S):
            return await self.pod.load(Wish(model_id, **wish))


@asynccontextmanager
async def running(tmp_path: Path, **settings: Any):
    rig = Rig(tmp_path, **settings)
    try:
        await rig.start()
        yield rig
    finally:
        rig.runtime.open_all()
        await rig.instance.close()


def with_policy(**changes: Any) -> Policy:
    return replace(Policy(), **changes)
