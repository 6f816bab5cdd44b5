"""A pod with an isolated model answers as one that runs it itself: over gRPC, REST and streams.

The pods are the request path of real ones, on a socket; the clients are the mesh's own.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import orjson
import pytest
import pytest_asyncio
from sklearn.datasets import load_iris
from sklearn.linear_model import LogisticRegression

from mesh.core.policy import Policy
from mesh.core.usage import Use
from mesh.instance.carrier import Carrier
from mesh.instance.executor import Executor
from mesh.instance.inference import MODEL_INFER, MODEL_STREAM_INFER, Inference
from mesh.instance.model_info import ModelInfo
from mesh.instance.servable import Servable
from mesh.internal_calls import REST_PATH
from mesh.metrics import InstanceMetrics
from mesh.runtimes.api import AnyModel, ModelSpec
from mesh.runtimes.isolated_fork_server import ForkServers
from mesh.runtimes.registry import RuntimeRegistry
from mesh.runtimes.settings import RuntimeSettings
from mesh.wire.client import Channel, RpcError
from mesh.wire.server import Server, Streaming, Unary
from protos import oip_pb2

from .isolation import MODEL, infer_request, isolation, python_model

pytestmark = pytest.mark.asyncio(loop_scope="module")

METADATA = "/inference.GRPCInferenceService/ModelMetadata"
NAME = (("mm-model-id", "the-id"), ("mm-vmodel-id", "the-alias"))


@asynccontextmanager
async def pod_of(model: AnyModel, folder: Path, name: str) -> AsyncIterator[Channel]:
    """The request path of an instance with this one model."""
    lost: list[str] = []
    idle: dict[str, Any] = {"on_idle": lost.append, "idle_wanted": lambda: False}
    metrics = InstanceMetrics()
    executor = Executor(Policy(), 2, metrics, 0, on_lost=lost.append, **idle)
    carrier = Carrier(Policy(), metrics, 0, on_lost=lost.append, **idle)
    servables = {"the-id": Servable("the-id", "sklearn", model, Use(), 8)}
    inference = Inference(servables, executor, carrier)
    methods = {
        MODEL_INFER: Unary(inference.model_infer, inference.accept),
        MODEL_STREAM_INFER: Streaming(inference.model_stream_infer, inference.accept),
        REST_PATH: Unary(inference.rest, inference.accept),
        **ModelInfo(servables, "", lambda: True, carrier).methods(),
    }
    server = Server(methods)
    await server.start_unix(str(folder / name))
    channel = Channel(f"unix:{folder / name}")
    try:
        yield channel
    finally:
        await channel.close()
        await server.close()
        executor.close()


@dataclass
class Pods:
    """``here`` runs the model itself, ``there`` in a worker."""

    here: Channel
    there: Channel

    async def both(self, path: str, message: bytes, metadata: Any = NAME) -> tuple[Any, Any]:
        answers = []
        for pod in (self.here, self.there):
            try:
                reply = await pod.unary(path, message, metadata=metadata, timeout_s=60.0)
                answers.append((reply.message, [f for f in reply.initial if b"mesh" in f[0]]))
            except RpcError as error:
                answers.append((error.code, error.message))
        return answers[0], answers[1]


@asynccontextmanager
async def pods(path: Path, kind: str, folder: Path, servers: ForkServers) -> AsyncIterator[Pods]:
    settings = RuntimeSettings(allow_pickle=True, allow_python=True)
    spec = ModelSpec("the-id", kind, path)
    async with AsyncExitStack() as stack:
        workers = await stack.enter_async_context(isolation(folder, servers))
        there = await workers.load("the-id", path=path, kind=kind)
        registry = RuntimeRegistry(settings)
        here = await asyncio.to_thread(lambda: registry.runtime_for(kind).load(spec))
        yield Pods(
            await stack.enter_async_context(pod_of(here, folder, "here")),
            await stack.enter_async_context(pod_of(there, folder, "there")),
        )


@pytest_asyncio.fixture(loop_scope="module")
async def python_pods(tmp_path: Path, servers: ForkServers) -> AsyncIterator[Pods]:
    async with pods(python_model(tmp_path / "model"), "python", tmp_path, servers) as both:
        yield both


async def test_a_joblib_model_answers_as_in_the_pod(tmp_path: Path, servers: ForkServers) -> None:
    features, labels = load_iris(return_X_y=True)
    estimator = LogisticRegression(max_iter=500).fit(features, labels)
    path = tmp_path / "model.joblib"
    joblib.dump(estimator, path)
    async with pods(path, "sklearn", tmp_path, servers) as both:
        request = oip_pb2.ModelInferRequest(id="7")
        request.inputs.add(name="predict", datatype="FP64", shape=list(features.shape))
        request.raw_input_contents.append(features.tobytes())
        request.outputs.add(name="predict_proba")
        here, there = await both.both(MODEL_INFER, request.SerializeToString())
        assert here == there
        answer = oip_pb2.ModelInferResponse.FromString(there[0])
        assert (answer.model_name, answer.id) == ("the-alias", "7")
        found = np.frombuffer(answer.raw_output_contents[0])
        expected = estimator.predict_proba(features)
        assert np.abs(found.reshape(expected.shape) - expected).max() < 1e-6
        body = orjson.dumps({"instances": features[:3].tolist()})
        rest = (*NAME, ("mesh-rest-kind", "v1-predict"), ("mesh-client-model-name", "asked"))
        here, there = await both.both(REST_PATH, body, rest)
        assert here == there
        assert orjson.loads(there[0])["predictions"] == estimator.predict(features[:3]).tolist()
        ask = oip_pb2.ModelMetadataRequest(name="the-alias").SerializeToString()
        here, there = await both.both(METADATA, ask)
        assert here == there


@pytest.mark.parametrize("version", ["", "1", "2", "3"])
async def test_each_version_tells_its_own_metadata(
    tmp_path: Path, servers: ForkServers, version: str
) -> None:
    for number in (1, 2):
        declared = f"class Model:\n    inputs = [('x{number}', 'FP32', [-1, {number}])]"
        python_model(tmp_path / "model" / str(number), MODEL.replace("class Model:", declared))
    async with pods(tmp_path / "model", "python", tmp_path, servers) as both:
        ask = oip_pb2.ModelMetadataRequest(name="the-alias", version=version).SerializeToString()
        here, there = await both.both(METADATA, ask)
        assert here == there
        if version != "3":
            found = oip_pb2.ModelMetadataResponse.FromString(there[0])
            assert [one.name for one in found.inputs] == [f"x{version or 2}"]
            assert found.name == "the-alias"


@pytest.mark.parametrize(
    "message",
    [
        pytest.param(infer_request([1.0, 2.0]), id="a request without a name"),
        pytest.param(infer_request([1.0], model_name="x", id="y"), id="a request with a name"),
        pytest.param(infer_request([1.0], "raise"), id="one that the model fails"),
        pytest.param(b"\xff\xff", id="nonsense"),
        pytest.param(b"", id="nothing"),
    ],
)
async def test_the_answer_is_the_same_as_in_the_pod_to(python_pods: Pods, message: bytes) -> None:
    here, there = await python_pods.both(MODEL_INFER, message)
    assert here == there


async def test_a_stream_is_answered_as_in_the_pod(python_pods: Pods) -> None:
    found = []
    for pod in (python_pods.here, python_pods.there):
        stream = pod.stream(MODEL_STREAM_INFER, metadata=NAME, timeout_s=60.0)
        for do in ("", "raise", ""):
            await stream.send(infer_request([3.0], do))
        await stream.half_close()
        found.append([message async for message in stream])
    assert found[0] == found[1]
    assert len(found[1]) == 3


async def test_a_stream_hears_why_its_model_died(python_pods: Pods) -> None:
    stream = python_pods.there.stream(MODEL_STREAM_INFER, metadata=NAME, timeout_s=60.0)
    await stream.send(infer_request([3.0], "segfault"))
    with pytest.raises(RpcError, match="killed by SIGSEGV"):
        _ = [message async for message in stream]


async def test_large_messages_pass(tmp_path: Path, python_pods: Pods) -> None:
    array = np.arange(3_000_000, dtype=np.float32)
    request = oip_pb2.ModelInferRequest()
    request.inputs.add(name="x", datatype="FP32", shape=[array.size])
    request.raw_input_contents.append(array.tobytes())
    _, there = await python_pods.both(MODEL_INFER, request.SerializeToString())
    answer = oip_pb2.ModelInferResponse.FromString(there[0])
    assert answer.raw_output_contents[0] == (array * 2).tobytes()
