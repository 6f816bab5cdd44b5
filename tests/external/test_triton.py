"""Triton, unmodified, behind an instance: models of its Python back end, on the CPU.

The server is the one of PyPI's nvidia-pytriton in ``.venv-triton``, or whatever MESH_TRITONSERVER
names (the path of ``tritonserver``, with its back ends beside its own folder).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass
from pathlib import Path

import grpc
import numpy as np
import pytest

from mesh.instance.answers import LoadOutcome
from mesh.instance.runtime_choice import choose_runtimes
from mesh.instance.settings import InstanceSettings
from mesh.runtimes.external_choice import external_runtimes
from mesh.serving_runtime import parse_serving_runtime
from protos import oip_pb2 as oip
from puller.settings import PullerSettings
from tests.etcd_server import free_port
from tests.external.rig import OIP, QUICK, ROOT, WAIT_S, Pod
from tests.instance.fakes import until

pytestmark = pytest.mark.client

CONFIG = """
backend: "python"
input [{name: "x" data_type: TYPE_FP32 dims: [-1]}]
output [{name: "y" data_type: TYPE_FP32 dims: [2]}]
instance_group [{kind: KIND_CPU}]
"""
LABELS = 'dims: [2] label_filename: "labels.txt"'
MODEL = """
import triton_python_backend_utils as triton

class TritonPythonModel:
    def execute(self, requests):
        return [self.answer(triton.get_input_tensor_by_name(r, "x").as_numpy()) for r in requests]

    def answer(self, x):
        if x[0] < 0:
            return triton.InferenceResponse(error=triton.TritonError("x is below zero"))
        return triton.InferenceResponse([triton.Tensor("y", x * FACTOR)])
"""


COMPLETE = """
    @staticmethod
    def auto_complete_config(config):
        config.set_max_batch_size(0)
        config.add_input({"name": "x", "data_type": "TYPE_FP32", "dims": [-1]})
        config.add_output({"name": "y", "data_type": "TYPE_FP32", "dims": [-1]})
        return config
"""


def tritonserver() -> Path | None:
    said = os.environ.get("MESH_TRITONSERVER")
    if said:
        return Path(said)
    installed = "lib/python3*/site-packages/pytriton/tritonserver/bin/tritonserver"
    return next((ROOT / ".venv-triton").glob(installed), None)


@dataclass(frozen=True)
class Triton:
    port: int
    root: Path  # ROOT_MODEL_DIR
    log: Path

    @property
    def folders(self) -> list[str]:
        return sorted(entry.name for entry in (self.root / "_repository").iterdir())


@pytest.fixture(scope="module")
def triton(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Triton]:
    server = tritonserver()
    if server is None or not server.exists():
        pytest.skip(
            "there is no tritonserver: make .venv-triton/.installed, or say MESH_TRITONSERVER"
        )
    base = tmp_path_factory.mktemp("triton")
    found = Triton(free_port(), base / "served", base / "triton.log")
    (found.root / "_repository").mkdir(parents=True)
    python = server.parents[6] / "bin"  # of the virtual environment whose NumPy its models import
    environment = {**os.environ, "PATH": f"{python}:{os.environ['PATH']}"}
    with found.log.open("wb") as log:
        process = subprocess.Popen(
            [
                str(server),
                f"--model-repository={found.root}/_repository",
                f"--backend-directory={server.parents[1]}/backends",
                "--model-control-mode=explicit",
                f"--grpc-port={found.port}",
                "--grpc-address=127.0.0.1",
                "--allow-http=false",
                "--allow-metrics=false",
            ],
            stdout=log,
            stderr=log,
            env=environment,
        )
    try:
        yield found
    finally:
        process.terminate()
        process.wait(WAIT_S)


def new_pod(triton: Triton, folder: Path) -> Pod:
    manifest = {
        "apiVersion": "serving.kserve.io/v1alpha1",
        "kind": "ServingRuntime",
        "metadata": {"name": "triton"},
        "spec": {
            "supportedModelFormats": [{"name": "python"}],
            "grpcDataEndpoint": f"port:{triton.port}",
            "builtInAdapter": {"serverType": "triton", "memBufferBytes": 0},
        },
    }
    runtimes = external_runtimes(
        parse_serving_runtime(manifest), env={"ROOT_MODEL_DIR": str(triton.root)}, times=QUICK
    )
    assert runtimes is not None
    return Pod(folder, runtimes, "python")


@pytest.fixture
async def pod(triton: Triton, tmp_path: Path) -> AsyncIterator[Pod]:
    served = new_pod(triton, tmp_path)
    try:
        await served.start()
        yield served
    finally:
        await served.close()


def write(pod: Pod, name: str, files: dict[str, str]) -> None:
    for path, content in files.items():
        file = pod.folder / "models" / name / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)


def times(factor: int) -> str:
    return MODEL.replace("FACTOR", str(factor))


def request(name: str, *values: float, version: str = "") -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(model_name=name, model_version=version, id="7")
    message.inputs.add(name="x", datatype="FP32", shape=[len(values)])
    message.raw_input_contents.append(np.array(values, np.float32).tobytes())
    return message


async def infer(pod: Pod, model_id: str, message: oip.ModelInferRequest) -> oip.ModelInferResponse:
    raw = await pod.call(OIP + "ModelInfer", message, model_id, alias=message.model_name)
    return oip.ModelInferResponse.FromString(raw)


def answer(reply: oip.ModelInferResponse) -> list[float]:
    return np.frombuffer(reply.raw_output_contents[0], np.float32).tolist()


async def on_triton(triton: Triton, rpc: str, message: object) -> bytes:
    """Behind the mesh's back."""
    async with grpc.aio.insecure_channel(f"127.0.0.1:{triton.port}") as channel:
        raw: bytes = await channel.unary_unary(OIP + rpc)(
            message.SerializeToString(),  # type: ignore[attr-defined]
            timeout=WAIT_S,
        )
        return raw


async def test_a_model_answers_under_the_clients_name_and_leaves_nothing_behind(
    pod: Pod, triton: Triton
) -> None:
    config = f'name: "other"\n{CONFIG.replace("dims: [2]", LABELS)}'
    files = {"config.pbtxt": config, "labels.txt": "cat\ndog", "1/model.py": times(2)}
    write(pod, "twice__isvc-1", files)
    loaded = await pod.load("twice__isvc-1")
    assert loaded.outcome is LoadOutcome.LOADED, (loaded, triton.log.read_text())
    assert loaded.size_bytes == round(1.25 * sum(map(len, files.values())))
    assert triton.folders == ["twice__isvc-1"]

    reply = await infer(pod, "twice__isvc-1", request("twice", 1.0, 2.5))
    assert (reply.model_name, reply.id, answer(reply)) == ("twice", "7", [2.0, 5.0])
    wanted = request("twice", 1.0, 3.0)
    wanted.outputs.add(name="y").parameters["classification"].int64_param = 1
    reply = await infer(pod, "twice__isvc-1", wanted)
    assert reply.raw_output_contents[0].endswith(b"6.000000:1:dog")
    raw = await pod.call(
        OIP + "ModelMetadata", oip.ModelMetadataRequest(name="twice"), "twice__isvc-1", "twice"
    )
    metadata = oip.ModelMetadataResponse.FromString(raw)
    assert (metadata.name, metadata.inputs[0].name, metadata.platform) == ("twice", "x", "python")
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer(pod, "twice__isvc-1", request("twice", -1.0, 0.0))
    assert "x is below zero" in (caught.value.details() or "")

    assert await pod.instance.pod.unload("twice__isvc-1", "test")
    assert triton.folders == []
    artifact = pod.folder / "models" / "twice__isvc-1"
    assert {file.relative_to(artifact).as_posix() for file in artifact.rglob("*")} == {*files, "1"}
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await on_triton(triton, "ModelInfer", request("twice__isvc-1", 1.0, 2.5))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND


async def test_an_operator_need_only_name_the_adapter(triton: Triton, tmp_path: Path) -> None:
    settings = InstanceSettings(
        PullerSettings(cache_dir=tmp_path),
        adapter="triton",
        runtime_endpoint=f"127.0.0.1:{triton.port}",
        adapter_env={"ROOT_MODEL_DIR": str(triton.root), "LOADING_CONCURRENCY": "3"},
    )
    chosen = await choose_runtimes(settings)
    try:
        assert chosen.settings.policy.load_slots == 3
        assert "python" in chosen.runtimes.model_types
    finally:
        await chosen.closable.close()


async def test_a_bare_file_and_a_name_with_odd_characters(pod: Pod, triton: Triton) -> None:
    name = "team a/thrice:50%"
    (pod.folder / "models").mkdir(exist_ok=True)
    (pod.folder / "models" / "thrice.py").write_text(times(3) + COMPLETE)
    loaded = await pod.load(name, path=f"file://{pod.folder}/models/thrice.py")
    assert loaded.outcome is LoadOutcome.LOADED, (loaded, triton.log.read_text())
    assert answer(await infer(pod, name, request(name, 2.0))) == [6.0]
    assert await pod.instance.pod.unload(name, "test")
    assert triton.folders == []


async def test_what_triton_cannot_load_fails_with_its_words_and_spoils_nothing(
    pod: Pod, triton: Triton, tmp_path: Path
) -> None:
    write(pod, "good", {"config.pbtxt": CONFIG, "1/model.py": times(2)})
    assert (await pod.load("good")).outcome is LoadOutcome.LOADED
    write(pod, "bad", {"config.pbtxt": CONFIG, "1/model.py": 'raise ValueError("my own words")'})
    failed = await pod.load("bad")
    assert failed.outcome is LoadOutcome.FAILED
    assert failed.code.name == "FAILED_PRECONDITION"
    assert "version 1 is at UNAVAILABLE state: Internal: ValueError: my own words" in failed.message
    assert triton.folders == ["good"]

    # For the next pod the server is there still, and has let go of what it had.
    (tmp_path / "again").mkdir()
    again = new_pod(triton, tmp_path / "again")
    try:
        await again.start()
        assert triton.folders == []
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await on_triton(triton, "ModelInfer", request("good", 1.0, 2.0))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    finally:
        await again.close()


async def test_a_version_is_asked_for_and_one_that_is_not_there_is_no_lost_model(
    pod: Pod,
) -> None:
    config = CONFIG + "version_policy: {all {}}"
    write(pod, "v", {"config.pbtxt": config, "1/model.py": times(2), "3/model.py": times(10)})
    assert (await pod.load("v")).outcome is LoadOutcome.LOADED
    versions = {"": 10.0, "1": 2.0, "3": 10.0}
    for version, value in versions.items():
        assert answer(await infer(pod, "v", request("v", 1.0, 2.0, version=version))) == [
            value,
            2 * value,
        ]
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await infer(pod, "v", request("v", 1.0, 2.0, version="9"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert (caught.value.details() or "").endswith("version 9 is not found")
    assert "v" in pod.instance.pod.servables
    assert answer(await infer(pod, "v", request("v", 1.0, 2.0))) == [10.0, 20.0]


async def test_a_stream_answers_and_what_triton_has_lost_is_loaded_anew(
    pod: Pod, triton: Triton
) -> None:
    write(pod, "s", {"config.pbtxt": CONFIG, "1/model.py": times(2)})
    await pod.load("s")
    method = pod.channel.stream_stream(OIP + "ModelStreamInfer")
    options = {"metadata": [("mm-model-id", "s"), ("mm-vmodel-id", "alias")], "timeout": WAIT_S}
    stream = method(**options)
    for values in ((1.0, 3.0), (-1.0, 3.0), (2.0, 3.0)):
        await stream.write(request("alias", *values).SerializeToString())
        reply = oip.ModelStreamInferResponse.FromString(await stream.read())
        if values[0] < 0:  # the model's own error is an answer of the stream
            assert "x is below zero" in reply.error_message
        else:
            assert reply.infer_response.model_name == "alias"
            assert answer(reply.infer_response) == [2 * value for value in values]
    await stream.done_writing()
    assert await stream.read() is grpc.aio.EOF
    await on_triton(
        triton, "RepositoryModelUnload", oip.RepositoryModelUnloadRequest(model_name="s")
    )
    stream = method(**options)
    await stream.write(request("alias", 1.0, 2.0).SerializeToString())
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await stream.read()
    assert ("mesh-error", "not-here") in [tuple(p) for p in caught.value.trailing_metadata()]
    await until(lambda: "s" not in pod.instance.pod.servables)
    assert (await pod.again("s")).outcome is LoadOutcome.LOADED
    assert answer(await infer(pod, "s", request("s", 1.0, 2.0))) == [2.0, 4.0]
