"""Several versions of one model: a request says which, the latest answers when it does not."""

from __future__ import annotations

from contextlib import asynccontextmanager
from pathlib import Path

import numpy as np
import onnx
import orjson
import pytest
from onnx import TensorProto, helper

from mesh import registry
from mesh.core.errors import Code
from mesh.core.types import ModelRecord
from mesh.instance.answers import LoadOutcome
from mesh.instance.flights import Wish
from mesh.instance.instance import Instance
from mesh.instance.settings import InstanceSettings
from mesh.internal_calls import REST_PATH
from mesh.runtimes.registry import RuntimeRegistry
from mesh.store.memory import MemoryStore
from mesh.wire.client import Channel, RpcError
from protos import oip_pb2
from puller.puller import Puller
from puller.settings import PullerSettings

WAIT_S = 60.0
SERVICE = "/inference.GRPCInferenceService/"
HEADER = (("mm-model-id", "scale"),)


def write_version(folder: Path, factor: float) -> None:
    """y = factor * x."""
    folder.mkdir(parents=True)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "f"], ["y"])],
        "scale",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n"])],
        [helper.make_tensor("f", TensorProto.FLOAT, [1], [factor])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))


@asynccontextmanager
async def serving(
    tmp_path: Path, factors: dict[str, float], *, config: str = "", concurrency: int | None = None
):
    """(instance, channel to it) with model ``scale``, whose version N multiplies by factors[N]."""
    for version, factor in factors.items():
        write_version(tmp_path / "models" / "scale" / version, factor)
    store = MemoryStore()
    if config:
        (tmp_path / "models" / "scale" / "config.pbtxt").write_text(config)
    path = f"file://{tmp_path}/models/scale"
    record = ModelRecord("scale", "onnx", path=path, max_concurrency=concurrency)
    revision = await store.put(registry.key_of(record), registry.encode(record))
    settings = InstanceSettings(
        puller=PullerSettings(cache_dir=tmp_path / "cache", file_roots=(tmp_path / "models",)),
        capacity_bytes=64 << 20,
        metrics_port=None,
        drain_notice_ms=0,
    )
    instance = Instance(settings, store, Puller(settings.puller), RuntimeRegistry())
    await instance.start()
    channel = Channel(instance.address)
    try:
        await instance.membership.joined.wait()
        answer = await instance.pod.load(Wish("scale", revision))
        assert answer.outcome is LoadOutcome.LOADED, answer
        yield instance, channel
    finally:
        await channel.close()
        await instance.close()


async def infer(channel: Channel, version: str = "") -> tuple[float, str]:
    """(the factor that answered, the version that it says it is)"""
    request = oip_pb2.ModelInferRequest(model_name="scale", model_version=version)
    request.inputs.add(name="x", datatype="FP32", shape=[1])
    request.raw_input_contents.append(np.ones(1, np.float32).tobytes())
    reply = await channel.unary(
        SERVICE + "ModelInfer", request.SerializeToString(), metadata=HEADER, timeout_s=WAIT_S
    )
    found = oip_pb2.ModelInferResponse.FromString(reply.message)
    return float(np.frombuffer(found.raw_output_contents[0], np.float32)[0]), found.model_version


async def test_a_request_chooses_and_the_latest_is_the_default(tmp_path: Path) -> None:
    async with serving(tmp_path, {"1": 2.0, "2": 3.0, "10": 5.0}) as (_, channel):
        for version, expected in (
            ("1", (2.0, "1")),
            ("2", (3.0, "2")),
            ("10", (5.0, "10")),
            ("", (5.0, "10")),
            ("1", (2.0, "1")),
        ):
            assert await infer(channel, version) == expected


async def test_a_version_that_is_not_there_is_named_with_those_that_are(tmp_path: Path) -> None:
    async with serving(tmp_path, {"1": 2.0, "2": 3.0}) as (_, channel):
        with pytest.raises(RpcError, match=r"no version '7'.*'2', '1'") as caught:
            await infer(channel, "7")
        assert caught.value.code is Code.NOT_FOUND


async def test_one_version_in_a_folder_keeps_its_name(tmp_path: Path) -> None:
    async with serving(tmp_path, {"3": 2.0}) as (instance, channel):
        assert await infer(channel) == (2.0, "3")
        assert not instance.pod.servables["scale"].special  # nothing to choose on the hit path


async def test_rest_and_streams_choose_too(tmp_path: Path) -> None:
    async with serving(tmp_path, {"1": 2.0, "2": 3.0}) as (_, channel):
        tensor = {"name": "x", "datatype": "FP32", "shape": [1], "data": [1.0]}
        for version, factor in (("1", 2.0), ("", 3.0)):
            metadata = (
                *HEADER,
                ("mesh-rest-kind", "v2-infer"),
                ("mesh-client-model-version", version),
            )
            body = orjson.dumps({"inputs": [tensor]})
            reply = await channel.unary(REST_PATH, body, metadata=metadata, timeout_s=WAIT_S)
            assert orjson.loads(reply.message)["outputs"][0]["data"] == [factor]
        stream = channel.stream(SERVICE + "ModelStreamInfer", metadata=HEADER, timeout_s=WAIT_S)
        request = oip_pb2.ModelInferRequest(model_name="scale", model_version="1")
        request.inputs.add(name="x", datatype="FP32", shape=[1])
        request.raw_input_contents.append(np.ones(1, np.float32).tobytes())
        await stream.send(request.SerializeToString())
        await stream.half_close()
        (answer,) = [message async for message in stream]
        inner = oip_pb2.ModelStreamInferResponse.FromString(answer).infer_response
        assert np.frombuffer(inner.raw_output_contents[0], np.float32).tolist() == [2.0]


async def test_what_is_told_of_a_model_names_its_versions(tmp_path: Path) -> None:
    async with serving(tmp_path, {"1": 2.0, "2": 3.0}) as (_, channel):
        message = oip_pb2.ModelMetadataRequest(name="scale").SerializeToString()
        reply = await channel.unary(
            SERVICE + "ModelMetadata", message, metadata=HEADER, timeout_s=WAIT_S
        )
        found = oip_pb2.ModelMetadataResponse.FromString(reply.message)
        assert list(found.versions) == ["2", "1"]
        for version in ("1", "2"):
            message = oip_pb2.ModelReadyRequest(name="scale", version=version).SerializeToString()
            await channel.unary(SERVICE + "ModelReady", message, metadata=HEADER, timeout_s=WAIT_S)


@pytest.mark.parametrize(
    ("said", "expected"), [(None, 3), (1, 1), (9, 9)], ids=["the model's", "fewer", "more"]
)
@pytest.mark.parametrize("versions", [("1", "2"), ("1",), (".",)], ids=["two", "one", "none"])
async def test_a_models_instances_are_its_requests_at_once_unless_the_user_says(
    tmp_path: Path, versions: tuple[str, ...], said: int | None, expected: int
) -> None:
    factors = dict.fromkeys(versions, 2.0)
    config = "instance_group [{count: 3 kind: KIND_CPU}]"
    async with serving(tmp_path, factors, config=config, concurrency=said) as (instance, _):
        assert instance.pod.servables["scale"].max_concurrency == expected
