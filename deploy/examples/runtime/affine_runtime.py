"""An example of a runtime that the mesh serves models with: copy it, put your own model in.

It implements ``mmesh.ModelRuntime``, by which a pod loads and unloads models, and for requests
``ModelInfer`` and ``ModelStreamInfer`` of the Open Inference Protocol and two methods of its own:
``example.Affine/Describe``, whose request gets the model's id put in by the mesh, and the stream
``example.Affine/Score`` (rows in, numbers out), which takes the id from the header mm-model-id.

Its models are JSON files: ``{"weights": [2.0, 3.0], "bias": 1.0}`` answers ``weights * x + bias``
for each row x. ``"load_seconds"`` makes a load slow, to try out time-outs.

    python affine_runtime.py --listen unix:/tmp/mmesh/grpc.sock
"""

from __future__ import annotations

import argparse
import asyncio
import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import numpy as np
from google.protobuf import json_format, struct_pb2, wrappers_pb2

# The messages come from protos/mmesh.proto and protos/oip.proto of this repository; in a project
# of your own generate them with grpcio-tools.
from protos import mmesh_pb2, oip_pb2

# What a loaded model takes beside its file: an array, a dictionary entry.
OVERHEAD_BYTES = 4096


@dataclass(frozen=True)
class AffineModel:
    weights: np.ndarray
    bias: float
    size_bytes: int

    @classmethod
    def read(cls, path: Path) -> tuple[AffineModel, float]:
        """The model, and for how long its load is to last. Raises ValueError."""
        if path.is_dir():
            files = sorted(path.glob("*.json"))
            if len(files) != 1:
                raise ValueError(f"expected one .json file in {path.name}, found {len(files)}")
            path = files[0]
        try:
            text = path.read_text()
            document = json.loads(text)
            weights = np.asarray(document["weights"], dtype=np.float64)
            model = cls(weights, float(document.get("bias", 0.0)), len(text) + OVERHEAD_BYTES)
            return model, float(document.get("load_seconds", 0.0))
        except (KeyError, TypeError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{path.name} is no affine model: {error!r}") from None


def bytes_on_disk(path: Path) -> int:
    files = [path] if path.is_file() else path.glob("*.json")
    return sum(file.stat().st_size for file in files)


def make_way(socket: Path) -> None:
    """For a new socket, where one that was killed has left its own."""
    socket.parent.mkdir(parents=True, exist_ok=True)
    socket.unlink(missing_ok=True)


class AffineRuntime:
    """Both services. Single-threaded: everything runs in the event loop."""

    def __init__(self, capacity_bytes: int, loading_timeout_ms: int) -> None:
        self.capacity_bytes = capacity_bytes
        self.loading_timeout_ms = loading_timeout_ms
        self.models: dict[str, AffineModel] = {}

    # ---- mmesh.ModelRuntime: what the pod asks ----

    async def runtimeStatus(self, request: Any, context: Any) -> Any:  # noqa: N802
        """READY means: no model is loaded that the pod does not know of."""
        method = mmesh_pb2.RuntimeStatusResponse.MethodInfo
        return mmesh_pb2.RuntimeStatusResponse(
            status=mmesh_pb2.RuntimeStatusResponse.READY,
            capacityInBytes=self.capacity_bytes,
            maxLoadingConcurrency=4,
            modelLoadingTimeoutMs=self.loading_timeout_ms,
            defaultModelSizeInBytes=OVERHEAD_BYTES,
            runtimeVersion="affine-1",
            # Whatever is not listed here is refused. The numbers say which string field of the
            # request takes the model's id.
            methodInfos={
                "inference.GRPCInferenceService/ModelInfer": method(idInjectionPath=[1]),
                "inference.GRPCInferenceService/ModelStreamInfer": method(idInjectionPath=[1]),
                "example.Affine/Describe": method(idInjectionPath=[1]),
                "example.Affine/Score": method(),
            },
        )

    async def loadModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        try:
            model, load_seconds = AffineModel.read(Path(request.modelPath))
        except ValueError as error:
            # Nothing was loaded and a second try will not help: INVALID_ARGUMENT.
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(error))
        except OSError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        self.models[request.modelId] = model  # taken already while it loads
        await asyncio.sleep(load_seconds)
        return mmesh_pb2.LoadModelResponse(sizeInBytes=model.size_bytes)

    async def unloadModel(self, request: Any, context: Any) -> Any:  # noqa: N802
        if self.models.pop(request.modelId, None) is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, "no such model")
        return mmesh_pb2.UnloadModelResponse()

    async def predictModelSize(self, request: Any, context: Any) -> Any:  # noqa: N802
        """From the file's size alone, at once."""
        size_bytes = bytes_on_disk(Path(request.modelPath)) + OVERHEAD_BYTES
        return mmesh_pb2.PredictModelSizeResponse(sizeInBytes=size_bytes)

    async def modelSize(self, request: Any, context: Any) -> Any:  # noqa: N802
        model = await self.model(request.modelId, context)
        return mmesh_pb2.ModelSizeResponse(sizeInBytes=model.size_bytes)

    # ---- inference ----

    async def model(self, model_id: str, context: Any) -> AffineModel:
        """NOT_FOUND tells the pod that the model is gone: it is loaded again."""
        found = self.models.get(model_id)
        if found is None:
            await context.abort(grpc.StatusCode.NOT_FOUND, f"model {model_id!r} is not loaded")
        return found

    async def infer(self, request: Any, context: Any) -> Any:
        model = await self.model(request.model_name, context)
        if len(request.inputs) != 1 or request.inputs[0].datatype != "FP64":
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "expected one input of FP64")
        given = request.inputs[0]
        raw = request.raw_input_contents
        rows = np.frombuffer(raw[0]) if raw else np.asarray(given.contents.fp64_contents)
        if rows.size % model.weights.size:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"{rows.size} numbers are no rows of {model.weights.size}",
            )
        answer = rows.reshape(-1, model.weights.size) @ model.weights + model.bias
        reply = oip_pb2.ModelInferResponse(model_name=request.model_name, id=request.id)
        output = reply.outputs.add(name="y", datatype="FP64", shape=[answer.size])
        if raw:
            reply.raw_output_contents.append(answer.tobytes())
        else:
            output.contents.fp64_contents.extend(answer.tolist())
        return reply

    async def stream_infer(self, requests: Any, context: Any) -> Any:
        async for request in requests:
            reply = await self.infer(request, context)
            yield oip_pb2.ModelStreamInferResponse(infer_response=reply)

    async def describe(self, request: Any, context: Any) -> Any:
        model = await self.model(request.value, context)
        document = {"id": request.value, "weights": model.weights.tolist(), "bias": model.bias}
        return json_format.ParseDict(document, struct_pb2.Struct())

    async def score(self, requests: Any, context: Any) -> Any:
        model = await self.model(dict(context.invocation_metadata())["mm-model-id"], context)
        async for row in requests:
            values = np.asarray(list(row), dtype=np.float64)
            if values.size != model.weights.size:
                await context.abort(
                    grpc.StatusCode.OUT_OF_RANGE,
                    f"expected {model.weights.size} numbers, found {values.size}",
                )
            yield wrappers_pb2.DoubleValue(value=float(values @ model.weights + model.bias))


def handlers(runtime: AffineRuntime) -> list[grpc.GenericRpcHandler]:
    def unary(method: Any, request: Any) -> grpc.RpcMethodHandler:
        return grpc.unary_unary_rpc_method_handler(
            method, request.FromString, lambda reply: reply.SerializeToString()
        )

    management = {
        "runtimeStatus": unary(runtime.runtimeStatus, mmesh_pb2.RuntimeStatusRequest),
        "loadModel": unary(runtime.loadModel, mmesh_pb2.LoadModelRequest),
        "unloadModel": unary(runtime.unloadModel, mmesh_pb2.UnloadModelRequest),
        "predictModelSize": unary(runtime.predictModelSize, mmesh_pb2.PredictModelSizeRequest),
        "modelSize": unary(runtime.modelSize, mmesh_pb2.ModelSizeRequest),
    }
    inference = {
        "ModelInfer": unary(runtime.infer, oip_pb2.ModelInferRequest),
        "ModelStreamInfer": grpc.stream_stream_rpc_method_handler(
            runtime.stream_infer,
            oip_pb2.ModelInferRequest.FromString,
            lambda reply: reply.SerializeToString(),
        ),
    }
    own = {
        "Describe": unary(runtime.describe, wrappers_pb2.StringValue),
        "Score": grpc.stream_stream_rpc_method_handler(
            runtime.score, struct_pb2.ListValue.FromString, lambda reply: reply.SerializeToString()
        ),
    }
    generic = grpc.method_handlers_generic_handler
    return [
        generic("mmesh.ModelRuntime", management),
        generic("inference.GRPCInferenceService", inference),
        generic("example.Affine", own),
    ]


async def serve(listen: str, capacity_bytes: int, loading_timeout_ms: int) -> None:
    server = grpc.aio.server()
    server.add_generic_rpc_handlers(handlers(AffineRuntime(capacity_bytes, loading_timeout_ms)))
    if listen.startswith("unix:"):
        make_way(Path(listen.removeprefix("unix:")))
    server.add_insecure_port(listen)
    await server.start()
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await stop.wait()
    await server.stop(grace=5)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--listen", default="unix:/tmp/mmesh/grpc.sock")
    parser.add_argument("--capacity-bytes", type=int, default=64 << 20)
    parser.add_argument("--loading-timeout-ms", type=int, default=30_000)
    options = parser.parse_args()
    asyncio.run(serve(options.listen, options.capacity_bytes, options.loading_timeout_ms))


if __name__ == "__main__":
    main()
