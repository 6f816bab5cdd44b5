"""A runtime of the tests' own: a real gRPC server with ``mmesh.ModelRuntime``, whose answers and
faults each test scripts."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import grpc
import grpc.aio

from mesh.runtimes.api import ModelSpec
from mesh.runtimes.external import ExternalRuntimes, ExternalTimes
from mesh.runtimes.external_model import ExternalModel
from protos import mmesh_pb2 as mmesh
from protos import oip_pb2 as oip
from tests.external.rig import QUICK

READY = mmesh.RuntimeStatusResponse(
    status=mmesh.RuntimeStatusResponse.READY,
    capacityInBytes=64 << 20,
    maxLoadingConcurrency=2,
    modelLoadingTimeoutMs=30_000,
    defaultModelSizeInBytes=7_777,
    allowAnyMethod=True,
)
STARTING = mmesh.RuntimeStatusResponse(status=mmesh.RuntimeStatusResponse.STARTING)
FAILING = mmesh.RuntimeStatusResponse(status=mmesh.RuntimeStatusResponse.FAILING)

_REQUESTS = {
    "runtimeStatus": mmesh.RuntimeStatusRequest,
    "loadModel": mmesh.LoadModelRequest,
    "unloadModel": mmesh.UnloadModelRequest,
    "predictModelSize": mmesh.PredictModelSizeRequest,
    "modelSize": mmesh.ModelSizeRequest,
}


def status(**fields: Any) -> mmesh.RuntimeStatusResponse:
    """READY with other fields."""
    found = mmesh.RuntimeStatusResponse()
    found.CopyFrom(READY)
    for name, value in fields.items():
        setattr(found, name, value)
    return found


class ScriptedRuntime:
    """``faults`` of a method are used up one a call, as (code, text); while ``gates`` has the
    method, its calls wait there. ``calls`` are (method, model), in the order in which they came."""

    def __init__(self, folder: Path) -> None:
        self.address = f"unix:{folder}/scripted.sock"
        self.said: list[mmesh.RuntimeStatusResponse] = [READY]  # the last one stays
        self.loaded = mmesh.LoadModelResponse(sizeInBytes=5_000)
        self.measured = mmesh.ModelSizeResponse(sizeInBytes=6_000)
        self.predicted = mmesh.PredictModelSizeResponse(sizeInBytes=4_000)
        self.faults: dict[str, list[tuple[grpc.StatusCode, str]]] = defaultdict(list)
        self.gates: dict[str, asyncio.Event] = {}
        self.calls: list[tuple[str, str]] = []
        self.told: list[mmesh.LoadModelRequest] = []
        self.ended: list[tuple[str, str]] = []  # also those that were cancelled
        self.working = 0
        self.most_working = 0
        self._server = grpc.aio.server()
        self._server.add_generic_rpc_handlers(self._handlers())
        self._server.add_insecure_port(self.address)

    async def start(self) -> None:
        await self._server.start()

    async def close(self) -> None:
        await self._server.stop(grace=None)

    def count(self, method: str) -> int:
        return sum(1 for called, _ in self.calls if called == method)

    def of(self, model_id: str) -> list[str]:
        return [method for method, called in self.calls if called == model_id]

    def _handlers(self) -> tuple[grpc.GenericRpcHandler, ...]:
        def managed(name: str) -> grpc.RpcMethodHandler:
            async def answer(request: Any, context: Any) -> Any:
                if name == "loadModel":
                    self.told.append(request)
                await self._follow(name, getattr(request, "modelId", ""), context)
                return self._answer(name)

            return grpc.unary_unary_rpc_method_handler(
                answer, _REQUESTS[name].FromString, lambda reply: reply.SerializeToString()
            )

        async def infer(request: Any, context: Any) -> Any:
            await self._work("ModelInfer", request.model_name, context)
            return oip.ModelInferResponse(model_name=request.model_name, id=request.id)

        async def stream(requests: Any, context: Any) -> Any:
            async for request in requests:
                await self._work("ModelStreamInfer", request.model_name, context)
                reply = oip.ModelInferResponse(model_name=request.model_name, id=request.id)
                yield oip.ModelStreamInferResponse(infer_response=reply)

        generic = grpc.method_handlers_generic_handler
        into = oip.ModelInferRequest.FromString
        inference = {
            "ModelInfer": grpc.unary_unary_rpc_method_handler(
                infer, into, lambda reply: reply.SerializeToString()
            ),
            "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
                stream, into, lambda reply: reply.SerializeToString()
            ),
        }
        return (
            generic("mmesh.ModelRuntime", {name: managed(name) for name in _REQUESTS}),
            generic("inference.GRPCInferenceService", inference),
        )

    async def _work(self, method: str, model_id: str, context: Any) -> None:
        self.working += 1
        self.most_working = max(self.most_working, self.working)
        try:
            await self._follow(method, model_id, context)
        finally:
            self.working -= 1

    async def _follow(self, method: str, model_id: str, context: Any) -> None:
        self.calls.append((method, model_id))
        try:
            if method in self.gates:
                await self.gates[method].wait()
            if self.faults[method]:
                await context.abort(*self.faults[method].pop(0))
        finally:
            self.ended.append((method, model_id))

    def _answer(self, name: str) -> Any:
        match name:
            case "runtimeStatus":
                return self.said.pop(0) if len(self.said) > 1 else self.said[0]
            case "loadModel":
                return self.loaded
            case "unloadModel":
                return mmesh.UnloadModelResponse()
            case "predictModelSize":
                return self.predicted
            case _:
                return self.measured


class Scripted:
    """The runtime, and what a pod has of it."""

    def __init__(self, runtime: ScriptedRuntime, runtimes: ExternalRuntimes) -> None:
        self.runtime = runtime
        self.runtimes = runtimes

    async def load(self, model_id: str = "m") -> ExternalModel:
        """As a pod does it, in a worker thread."""
        return await asyncio.to_thread(self.runtimes.load, spec(model_id))

    async def predict(self, model_id: str = "m") -> int:
        return await asyncio.to_thread(self.runtimes.predict_size_bytes, spec(model_id))


def spec(model_id: str) -> ModelSpec:
    return ModelSpec(model_id, "affine", Path(f"/nowhere/{model_id}"))


@asynccontextmanager
async def scripted(folder: Path, *, start: bool = True, **times: Any) -> AsyncIterator[Scripted]:
    """``start``: also wait until it is ready. ``times`` are of ``ExternalTimes``."""
    runtime = ScriptedRuntime(folder)
    await runtime.start()
    wanted: ExternalTimes = replace(QUICK, **times)
    runtimes = ExternalRuntimes.at(("affine",), runtime.address, times=wanted)
    try:
        if start:
            await runtimes.start()
        yield Scripted(runtime, runtimes)
    finally:
        for gate in runtime.gates.values():
            gate.set()
        await runtimes.close()
        await runtime.close()
