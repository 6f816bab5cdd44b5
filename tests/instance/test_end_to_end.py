"""The real thing: ONNX models from the disk, and the process with its etcd, its signals, its pages.

The client is grpcio; nothing here is faked but the mesh around the instance.
"""

from __future__ import annotations

import asyncio
import sys
import urllib.request
from pathlib import Path

import grpc
import grpc.aio
import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from mesh import registry
from mesh.core.types import CopyState, InstanceState, ModelRecord
from mesh.instance.answers import LoadOutcome
from mesh.instance.flights import Wish
from mesh.instance.instance import Instance
from mesh.instance.settings import InstanceSettings
from mesh.runtimes.registry import RuntimeRegistry
from mesh.store.etcd import EtcdStore
from mesh.store.etcd_options import EtcdOptions
from mesh.store.memory import MemoryStore
from protos import mesh_internal_pb2, oip_pb2
from puller.puller import Puller
from puller.settings import PullerSettings
from tests.etcd_server import EtcdServer

INFER = "/inference.GRPCInferenceService/ModelInfer"
WAIT_S = 60.0


def write_model(folder: Path, factor: float) -> None:
    """y = factor * x, shape [-1, 4]."""
    folder.mkdir(parents=True)
    graph = helper.make_graph(
        [helper.make_node("Mul", ["x", "f"], ["y"])],
        "scale",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [helper.make_tensor("f", TensorProto.FLOAT, [1], [factor])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(model, str(folder / "model.onnx"))


def request(name: str) -> bytes:
    message = oip_pb2.ModelInferRequest(model_name=name)
    message.inputs.add(name="x", datatype="FP32", shape=[1, 4])
    message.raw_input_contents.append(np.ones(4, dtype=np.float32).tobytes())
    return message.SerializeToString()


def settings_for(tmp_path: Path, **changes: object) -> InstanceSettings:
    return InstanceSettings(
        puller=PullerSettings(cache_dir=tmp_path / "cache", file_roots=(tmp_path / "models",)),
        capacity_bytes=64 << 20,
        drain_notice_ms=0,
        **changes,  # type: ignore[arg-type]
    )


async def test_an_onnx_model_is_pulled_loaded_measured_and_served(tmp_path: Path) -> None:
    write_model(tmp_path / "models" / "double", 2.0)
    store = MemoryStore()
    record = ModelRecord("double", "onnx", path=f"file://{tmp_path}/models/double")
    revision = await store.put(registry.key_of(record), registry.encode(record))
    settings = settings_for(tmp_path, metrics_port=None)
    instance = Instance(settings, store, Puller(settings.puller), RuntimeRegistry())
    await instance.start()
    try:
        async with asyncio.timeout(WAIT_S):
            await instance.membership.joined.wait()
            answer = await instance.pod.load(Wish("double", revision))
        assert answer.outcome is LoadOutcome.LOADED, answer
        assert answer.size_bytes > 0
        async with grpc.aio.insecure_channel(instance.address) as channel:
            for _ in range(20):
                raw = await channel.unary_unary(INFER)(request("double"), timeout=WAIT_S)
                reply = oip_pb2.ModelInferResponse.FromString(raw)
                values = np.frombuffer(reply.raw_output_contents[0], dtype=np.float32)
                assert values.tolist() == [2.0] * 4
        assert instance.pod.servables["double"].statistics.success_count == 20
        assert instance.metrics.value("loads", "onnx", "loaded") == 1
    finally:
        await instance.close()


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("file://{root}/models/absent", "absent"),
        ("file:///etc/passwd", "root"),
        ("file://{root}/models/broken", "Protobuf parsing failed"),
    ],
)
async def test_what_cannot_be_loaded_says_why(tmp_path: Path, path: str, words: str) -> None:
    broken = tmp_path / "models" / "broken"
    broken.mkdir(parents=True)
    (broken / "model.onnx").write_bytes(b"this is no model")
    store = MemoryStore()
    record = ModelRecord("m", "onnx", path=path.format(root=tmp_path))
    revision = await store.put(registry.key_of(record), registry.encode(record))
    settings = settings_for(tmp_path, metrics_port=None)
    instance = Instance(settings, store, Puller(settings.puller), RuntimeRegistry())
    await instance.start()
    try:
        async with asyncio.timeout(WAIT_S):
            await instance.membership.joined.wait()
            answer = await instance.pod.load(Wish("m", revision))
        assert answer.outcome is LoadOutcome.FAILED
        assert answer.code.name == "FAILED_PRECONDITION"
        assert words in answer.message
        assert instance.pod.cache.used_bytes == 0
    finally:
        await instance.close()


def get(address: str, path: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(f"http://{address}{path}", timeout=60) as response:
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


PROGRAM = """
import logging, sys
from pathlib import Path
from mesh.instance.process import serve
from mesh.instance.settings import InstanceSettings
from puller.settings import PullerSettings
logging.basicConfig(level=logging.INFO)
root = Path(sys.argv[1])
sys.exit(serve(InstanceSettings(
    puller=PullerSettings(cache_dir=root / "cache", file_roots=(root / "models",)),
    etcd_endpoints=(sys.argv[2],), capacity_bytes=64 << 20, drain_notice_ms=50)))
"""


async def find_record(store: EtcdStore):
    async with asyncio.timeout(WAIT_S):
        async for batch in store.watch(registry.INSTANCES_PREFIX):
            items = getattr(batch, "items", None) or getattr(batch, "events", ())
            for item in items:
                if item.value:
                    return registry.decode(item.key, item.value)
    raise AssertionError("the watch ended")


@pytest.mark.etcd
async def test_the_process_joins_serves_and_leaves_with_status_0_on_sigterm(
    tmp_path: Path,
) -> None:
    write_model(tmp_path / "models" / "triple", 3.0)
    with EtcdServer() as etcd:
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", PROGRAM, str(tmp_path), etcd.endpoint
        )
        store = EtcdStore(EtcdOptions(endpoints=(etcd.endpoint,)))
        try:
            me = await find_record(store)
            assert me.state is InstanceState.READY
            record = ModelRecord("triple", "onnx", path=f"file://{tmp_path}/models/triple")
            revision = await store.put(registry.key_of(record), registry.encode(record))
            async with grpc.aio.insecure_channel(me.address) as channel:
                load = mesh_internal_pb2.LoadRequest(model_id="triple", revision=revision)
                raw = await channel.unary_unary("/mesh.internal.v1.Instance/Load")(
                    load.SerializeToString(), timeout=WAIT_S
                )
                answer = mesh_internal_pb2.LoadResponse.FromString(raw)
                assert answer.outcome == mesh_internal_pb2.LoadResponse.LOADED, answer
                raw = await channel.unary_unary(INFER)(request("triple"), timeout=WAIT_S)
                reply = oip_pb2.ModelInferResponse.FromString(raw)
                values = np.frombuffer(reply.raw_output_contents[0], dtype=np.float32)
                assert values.tolist() == [3.0] * 4
            status, text = await asyncio.to_thread(get, me.metrics_address, "/readyz")
            assert (status, text) == (200, "ok\n")
            status, text = await asyncio.to_thread(get, me.metrics_address, "/metrics")
            assert status == 200
            assert "modelmesh_instance_models_total 1.0" in text
            copy_key = registry.copy_key("triple", me.instance_id)
            async with asyncio.timeout(WAIT_S):
                async for batch in store.watch(copy_key):  # published after the answer
                    items = getattr(batch, "items", None) or getattr(batch, "events", ())
                    states = {registry.decode(item.key, item.value).state for item in items}
                    if CopyState.LOADED in states:
                        break
            process.terminate()
            async with asyncio.timeout(WAIT_S):
                assert await process.wait() == 0
            assert (await store.range(registry.INSTANCES_PREFIX)).items == ()
            assert (await store.range(registry.COPIES_PREFIX)).items == ()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
            await store.close()
