"""A whole mesh in one process: routers and instances on a store in memory, foreign clients to it.

Instances run a fake runtime that doubles its input (``tests.instance.fakes``); everything between
the client's socket and that runtime is the real thing.
"""

from __future__ import annotations

import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import aiohttp
import grpc
import orjson

from mesh import registry
from mesh.core.policy import Policy
from mesh.core.types import ModelRecord
from mesh.store.api import Put
from mesh.store.memory import MemoryStore
from protos import mesh_admin_pb2 as admin
from protos import oip_pb2 as oip
from router.process import Bound, Router
from router.settings import RouterSettings
from tests.instance.fakes import Rig, until

OIP = "/inference.GRPCInferenceService/"
MM = "/mmesh.ModelMesh/"
ADMIN = "/mesh.admin.v1.Admin/"

# The leader looks often, so that no test waits for it.
POLICY = replace(Policy(), leader_sweep_ms=50, orphan_grace_ms=0)


class MeshRig:
    def __init__(self, tmp_path: Path) -> None:
        self.tmp_path = tmp_path
        self.store = MemoryStore()
        self.server = self.store.server
        self.pods: list[Rig] = []
        self.routers: list[Router] = []
        self.bounds: list[Bound] = []
        self.channels: list[grpc.aio.Channel] = []
        self.http: aiohttp.ClientSession | None = None

    # ---- parts --------------------------------------------------------------------------------

    async def add_pod(self, **settings: Any) -> Rig:
        pod = Rig(self.tmp_path, store=self.store.peer(), **settings)
        self.pods.append(pod)
        await pod.start()
        await self.seen()
        return pod

    async def add_router(self, **settings: Any) -> Router:
        fixed = {
            "grpc_port": 0,
            "rest_port": 0,
            "metrics_port": 0,
            "reuse_port": False,
            "drain_notice_ms": 0,
            "drain_timeout_ms": 20_000,
            "policy": POLICY,
        }
        router = Router(RouterSettings(**{**fixed, **settings}), self.store.peer())
        self.routers.append(router)
        bound = await router.start()
        self.bounds.append(bound)
        self.channels.append(grpc.aio.insecure_channel(f"127.0.0.1:{bound.grpc_port}"))
        if self.http is None:
            self.http = aiohttp.ClientSession()
        await self.seen()
        return router

    async def seen(self) -> None:
        """Every router knows every instance."""
        ids = {pod.instance.instance_id for pod in self.pods}
        await until(lambda: all(ids <= r.view.instances.keys() for r in self.routers))

    async def close(self) -> None:
        for channel in self.channels:
            await channel.close()
        if self.http is not None:
            await self.http.close()
        for router in self.routers:
            await router.close()
        for pod in self.pods:
            pod.runtime.open_all()
            await pod.instance.close()
        await self.store.close()

    # ---- what is registered -------------------------------------------------------------------

    async def register(self, model_id: str, **fields: Any) -> None:
        record = ModelRecord(model_id, "fake", **fields)
        self.server.apply([Put(registry.key_of(record), registry.encode(record))])
        await until(lambda: all(model_id in r.view.models for r in self.routers))

    def loads_of(self, model_id: str) -> int:
        """How often the runtimes of all pods began to load it."""
        return sum(pod.runtime.loading.count(model_id) for pod in self.pods)

    def holders(self, model_id: str) -> list[Rig]:
        return [pod for pod in self.pods if model_id in pod.pod.servables]

    # ---- clients ------------------------------------------------------------------------------

    async def call(
        self,
        path: str,
        request: Any,
        answer: type[Any],
        *,
        router: int = 0,
        metadata: Any = (),
        timeout: float = 60,
    ) -> Any:
        method = self.channels[router].unary_unary(path)
        reply = await method(request.SerializeToString(), metadata=metadata, timeout=timeout)
        return answer.FromString(reply)

    async def infer(self, name: str, *values: float, **options: Any) -> list[float]:
        reply = await self.call(
            OIP + "ModelInfer", infer_request(name, *values), oip.ModelInferResponse, **options
        )
        raw = reply.raw_output_contents[0]
        return list(struct.unpack(f"<{len(raw) // 4}f", raw))

    async def apply(self, name: str, uri: str, router: int = 0, **spec: Any) -> Any:
        return await self.apply_resource(isvc(name, uri, **spec), router)

    async def apply_resource(
        self, resource: Any, router: int = 0, *, load_now: bool = False
    ) -> Any:
        request = admin.ApplyRequest(manifest_json=orjson.dumps(resource), load_now=load_now)
        return await self.call(ADMIN + "Apply", request, admin.ApplyResponse, router=router)

    def url(self, path: str, router: int = 0) -> str:
        return f"http://127.0.0.1:{self.bounds[router].rest_port}{path}"


def infer_request(name: str, *values: float) -> oip.ModelInferRequest:
    return oip.ModelInferRequest(
        model_name=name,
        id="r1",
        inputs=[
            oip.ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[len(values)])
        ],
        raw_input_contents=[struct.pack(f"<{len(values)}f", *values)],
    )


def isvc(name: str, uri: str, **predictor: Any) -> dict[str, Any]:
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name},
        "spec": {
            "predictor": {
                "model": {"modelFormat": {"name": "fake"}, "storageUri": uri},
                **predictor,
            }
        },
    }


def on_runtime(name: str, runtime_name: str) -> dict[str, Any]:
    """An InferenceService that names its runtime."""
    resource = isvc(name, "fake://1")
    resource["spec"]["predictor"]["model"]["runtime"] = runtime_name
    return resource


def serving_runtime(name: str, kind: str = "ServingRuntime", **spec: Any) -> dict[str, Any]:
    """For the format ``fake``."""
    formats = [{"name": "fake", "version": "1", "autoSelect": True}]
    return {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": kind,
        "metadata": {"name": name},
        "spec": {"supportedModelFormats": formats, "multiModel": True, **spec},
    }


@asynccontextmanager
async def mesh(
    tmp_path: Path, *, pods: int = 1, routers: int = 1, **settings: Any
) -> AsyncIterator[MeshRig]:
    rig = MeshRig(tmp_path)
    try:
        for _ in range(routers):
            await rig.add_router(**settings)
        for _ in range(pods):
            await rig.add_pod()
        yield rig
    finally:
        await rig.close()
