"""A runtime of one's own behind a router and an instance, each its own process: what a client sends
reaches the runtime under the model's id, and what the runtime says comes back as it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any

import grpc
import pytest
from google.protobuf import struct_pb2, wrappers_pb2

from protos import mmesh_pb2 as mmesh
from protos import oip_pb2 as oip
from tests.e2e.asking import MMESH, OIP, TIMEOUT_S, Asker, isvc
from tests.e2e.processes import serving
from tests.etcd_server import EtcdServer, free_port
from tests.up.live import REPOSITORY

pytestmark = [pytest.mark.e2e, pytest.mark.etcd]

EXAMPLE = REPOSITORY / "deploy" / "examples" / "runtime"
DESCRIBE, SCORE = "/example.Affine/Describe", "/example.Affine/Score"
# ``line`` is an InferenceService, ``line-1`` a model that was registered by itself.
DATAPLANE = {
    "rpcConfigs": {
        "inference.GRPCInferenceService/ModelInfer": {"idExtractionPath": [1], "vModelId": True},
        "inference.GRPCInferenceService/ModelStreamInfer": {"idExtractionPath": [1]},
        "example.Affine/Describe": {"idExtractionPath": [1]},
        "example.Affine/Score": {},
        "example.Affine/Unlisted": {},
    }
}


@pytest.fixture(scope="module")
def ask(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Asker]:
    folder = tmp_path_factory.mktemp("external")
    (folder / "line").mkdir()
    (folder / "line" / "model.json").write_text(json.dumps({"weights": [2.0, 3.0], "bias": 1.0}))
    (folder / "dataplane.json").write_text(json.dumps(DATAPLANE))
    socket, port = f"unix:{folder}/rt.sock", free_port()
    with ExitStack() as running:
        runtime = subprocess.Popen(
            [sys.executable, str(EXAMPLE / "affine_runtime.py"), "--listen", socket],
            env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
            stdout=subprocess.DEVNULL,
        )
        running.callback(runtime.wait, TIMEOUT_S)
        running.callback(runtime.terminate)
        etcd = running.enter_context(EtcdServer())
        of_instance = (
            *("--serving-runtime", str(EXAMPLE / "servingruntime.yaml")),
            *("--runtime-endpoint", socket, "--runtime-data-endpoint", socket),
            *("--file-root", str(folder), "--cache-dir", str(folder / "cache")),
        )
        of_router = (
            *("--grpc-port", str(port), "--rest-port", str(free_port())),
            *("--dataplane-config", str(folder / "dataplane.json")),
        )
        instance = running.enter_context(serving(folder, "instance", etcd.endpoint, *of_instance))
        router = running.enter_context(serving(folder, "router", etcd.endpoint, *of_router))
        instance.ready()
        router.ready()
        asker = running.enter_context(Asker(f"127.0.0.1:{port}"))
        uri = (folder / "line").as_uri()
        asker.apply(isvc("line", uri, "affine"))
        info = mmesh.ModelInfo(type="affine", path=uri)
        asker.call(
            MMESH + "registerModel",
            mmesh.RegisterModelRequest(modelId="line-1", modelInfo=info),
            mmesh.ModelStatusInfo,
        )
        yield asker


def infer_request(name: str, *values: float) -> oip.ModelInferRequest:
    message = oip.ModelInferRequest(model_name=name, id="r1")
    tensor = message.inputs.add(name="x", datatype="FP64", shape=[len(values)])
    tensor.contents.fp64_contents.extend(values)
    return message


def stream(
    ask: Asker, path: str, messages: Sequence[Any], metadata: Sequence[tuple[str, str]] = ()
) -> list[bytes]:
    method = ask.channel.stream_stream(path)
    sent = iter([message.SerializeToString() for message in messages])
    return list(method(sent, metadata=tuple(metadata), timeout=TIMEOUT_S))


def row(*values: float) -> struct_pb2.ListValue:
    found = struct_pb2.ListValue()
    found.extend(values)
    return found


def refusal(call: Any) -> tuple[grpc.StatusCode, str]:
    with pytest.raises(grpc.RpcError) as caught:
        call()
    return caught.value.code(), caught.value.details()


def test_a_request_by_the_stable_name_is_answered_under_it(ask: Asker) -> None:
    reply = ask.call(OIP + "ModelInfer", infer_request("line", 1.0, 1.0), oip.ModelInferResponse)
    assert (reply.model_name, reply.id) == ("line", "r1")
    assert list(reply.outputs[0].contents.fp64_contents) == [6.0]


def test_a_models_own_id_is_no_vmodel(ask: Asker) -> None:
    def call() -> None:
        ask.call(OIP + "ModelInfer", infer_request("line-1", 1.0, 1.0), oip.ModelInferResponse)

    code, details = refusal(call)
    assert code is grpc.StatusCode.NOT_FOUND
    assert details.startswith("vmodel not found: 'line-1' is a model's own id")


def test_a_stream_is_answered_under_the_name_that_it_used(ask: Asker) -> None:
    for name in ("line", "line-1"):
        raw = stream(
            ask,
            OIP + "ModelStreamInfer",
            [infer_request(name, 1.0, 1.0), infer_request(name, 0.0, 1.0)],
        )
        replies = [oip.ModelStreamInferResponse.FromString(one).infer_response for one in raw]
        found = [(one.model_name, one.outputs[0].contents.fp64_contents[0]) for one in replies]
        assert found == [(name, 6.0), (name, 4.0)]


@pytest.mark.parametrize("name", ["line", "line-1"])
def test_a_method_of_the_runtimes_own_names_the_model_and_gets_its_id_put_in(
    ask: Asker, name: str
) -> None:
    described = ask.call(DESCRIBE, wrappers_pb2.StringValue(value=name), struct_pb2.Struct)
    assert list(described["weights"]) == [2.0, 3.0]
    expected = name if name == "line-1" else "line__isvc-"
    assert described["id"].startswith(expected)


@pytest.mark.parametrize("header", [("mm-vmodel-id", "line"), ("mm-model-id", "line-1")])
def test_a_stream_of_the_runtimes_own_is_passed_through_both_ways(
    ask: Asker, header: tuple[str, str]
) -> None:
    raw = stream(ask, SCORE, [row(1, 1), row(0, 0), row(0, 1)], [header])
    assert [wrappers_pb2.DoubleValue.FromString(one).value for one in raw] == [6.0, 1.0, 4.0]


def test_the_runtimes_own_errors_reach_the_client_in_its_words(ask: Asker) -> None:
    def unary() -> None:
        ask.call(OIP + "ModelInfer", infer_request("line", 1.0), oip.ModelInferResponse)

    expected = (grpc.StatusCode.INVALID_ARGUMENT, "1 numbers are no rows of 2")
    assert refusal(unary) == expected
    header = [("mm-model-id", "line-1")]
    expected = (grpc.StatusCode.OUT_OF_RANGE, "expected 2 numbers, found 3")
    assert refusal(lambda: stream(ask, SCORE, [row(1, 1), row(1, 1, 1)], header)) == expected


@pytest.mark.parametrize("path", ["/example.Affine/Unlisted", "/example.Affine/Unknown"])
def test_a_method_that_the_runtime_or_the_router_does_not_list_is_refused(
    ask: Asker, path: str
) -> None:
    code, details = refusal(lambda: stream(ask, path, [row(1)], [("mm-model-id", "line-1")]))
    assert (code, details) == (
        grpc.StatusCode.UNIMPLEMENTED,
        "Method not found or not permitted",
    )
