"""The calls by which a pod manages an external runtime: ``mmesh.ModelRuntime`` over gRPC.

``Management`` is what ``mesh.runtimes.external`` needs of any such server; the adapters in
``mesh.runtimes.v2_repository`` are the other one that implements it. Thin: time-outs, retries and
what an error means are the caller's. Everything runs in the event loop and raises ``RpcError``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Protocol, TypeVar

from google.protobuf.message import DecodeError, Message

from mesh.core.errors import Code, MeshError
from mesh.runtimes.external_status import RuntimeStatus, read_status
from mesh.wire.client import Channel, RpcError
from protos import mmesh_pb2 as mmesh

SERVICE: Final = "/mmesh.ModelRuntime/"
_STATUS_TIMEOUT_S: Final = 5.0

M = TypeVar("M", bound=Message)


class RuntimeFailing(MeshError):
    """The runtime says that it will not come up."""

    code = Code.FAILED_PRECONDITION


@dataclass(frozen=True, slots=True)
class LoadOrder:
    """What a runtime is told of a model. ``path`` is local; ``key`` is ModelMesh's JSON."""

    model_id: str
    model_type: str
    path: Path
    key: str


@dataclass(frozen=True, slots=True)
class Loaded:
    size_bytes: int  # 0: to be asked for
    max_concurrency: int = 0


class Management(Protocol):
    """One runtime's management side."""

    @property
    def address(self) -> str: ...

    async def status(self) -> RuntimeStatus | None:
        """None while it starts. Raises RuntimeFailing, or RpcError when nobody answers."""
        ...

    async def load(self, order: LoadOrder, timeout_s: float) -> Loaded:
        """Return when it is loaded. Cancelling cancels the call."""
        ...

    async def size_bytes(self, model_id: str, timeout_s: float) -> int: ...

    async def predict_size_bytes(self, order: LoadOrder, timeout_s: float) -> int: ...

    async def unload(self, model_id: str, timeout_s: float) -> None: ...

    async def close(self) -> None: ...


class ModelRuntimeClient:
    """``mmesh.ModelRuntime`` at one address."""

    def __init__(self, channel: Channel) -> None:
        self._channel = channel

    @property
    def address(self) -> str:
        return self._channel.address

    async def status(self) -> RuntimeStatus | None:
        answer = await self._call(
            "runtimeStatus",
            mmesh.RuntimeStatusRequest(),
            mmesh.RuntimeStatusResponse,
            _STATUS_TIMEOUT_S,
        )
        if answer.status == mmesh.RuntimeStatusResponse.STARTING:
            return None
        if answer.status != mmesh.RuntimeStatusResponse.READY:
            raise RuntimeFailing(f"the runtime at {self.address} says FAILING: see its own log")
        return read_status(answer)

    async def load(self, order: LoadOrder, timeout_s: float) -> Loaded:
        request = mmesh.LoadModelRequest(
            modelId=order.model_id,
            modelType=order.model_type,
            modelPath=str(order.path),
            modelKey=order.key,
        )
        answer = await self._call("loadModel", request, mmesh.LoadModelResponse, timeout_s)
        return Loaded(answer.sizeInBytes, answer.maxConcurrency)

    async def size_bytes(self, model_id: str, timeout_s: float) -> int:
        request = mmesh.ModelSizeRequest(modelId=model_id)
        answer = await self._call("modelSize", request, mmesh.ModelSizeResponse, timeout_s)
        return int(answer.sizeInBytes)

    async def predict_size_bytes(self, order: LoadOrder, timeout_s: float) -> int:
        request = mmesh.PredictModelSizeRequest(
            modelId=order.model_id,
            modelType=order.model_type,
            modelPath=str(order.path),
            modelKey=order.key,
        )
        answer = await self._call(
            "predictModelSize", request, mmesh.PredictModelSizeResponse, timeout_s
        )
        return int(answer.sizeInBytes)

    async def unload(self, model_id: str, timeout_s: float) -> None:
        request = mmesh.UnloadModelRequest(modelId=model_id)
        await self._call("unloadModel", request, mmesh.UnloadModelResponse, timeout_s)

    async def close(self) -> None:
        await self._channel.close()

    async def _call(self, rpc: str, request: Message, kind: type[M], timeout_s: float) -> M:
        return await call(self._channel, SERVICE + rpc, request, kind, timeout_s)


async def call(channel: Channel, path: str, request: Message, kind: type[M], timeout_s: float) -> M:
    """One unary call with parsed messages."""
    reply = await channel.unary(path, request.SerializeToString(), timeout_s=timeout_s)
    answer = kind()
    try:
        answer.ParseFromString(reply.message)
    except DecodeError as error:
        raise RpcError(
            Code.INTERNAL, f"{path} at {channel.address} answered with no {kind.__name__}: {error}"
        ) from None
    return answer
