"""A mesh as its clients see it: gRPC by grpcio, REST by http.client, /metrics by its text.

Nothing of the mesh's own code is on the asking side but the message stubs.
"""

from __future__ import annotations

import http.client
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import grpc
import numpy as np
import numpy.typing as npt
from google.protobuf.message import Message

from protos import mesh_admin_pb2 as admin
from protos import oip_pb2 as oip
from tests.up.live import LiveMesh

OIP = "/inference.GRPCInferenceService/"
MMESH = "/mmesh.ModelMesh/"
ADMIN = "/mesh.admin.v1.Admin/"
TIMEOUT_S = 60.0

Array = npt.NDArray[Any]
Reply = TypeVar("Reply", bound=Message)
Metadata = Sequence[tuple[str, str | bytes]]

SETOSA, VIRGINICA = [5.1, 3.5, 1.4, 0.2], [6.3, 3.3, 6.0, 2.5]
FLOWERS = np.array([SETOSA, VIRGINICA], np.float32)
LABELS = [0, 2]

# Some tests want more than one connection, and so more than one router.
_OWN_CONNECTION = (("grpc.use_local_subchannel_pool", 1), ("grpc.max_receive_message_length", -1))


class Asker:
    """One connection to a mesh's gRPC address."""

    def __init__(self, address: str, credentials: grpc.ChannelCredentials | None = None) -> None:
        self.channel = (
            grpc.secure_channel(address, credentials, _OWN_CONNECTION)
            if credentials is not None
            else grpc.insecure_channel(address, _OWN_CONNECTION)
        )

    def __enter__(self) -> Asker:
        return self

    def __exit__(self, *_: object) -> None:
        self.channel.close()

    def call(
        self,
        path: str,
        request: Message,
        reply: type[Reply],
        metadata: Metadata = (),
        timeout_s: float = TIMEOUT_S,
    ) -> Reply:
        method = self.channel.unary_unary(
            path,
            request_serializer=lambda message: message.SerializeToString(),
            response_deserializer=reply.FromString,
        )
        answer: Reply = method(request, timeout=timeout_s, metadata=tuple(metadata))
        return answer

    def infer(
        self,
        request: oip.ModelInferRequest,
        metadata: Metadata = (),
        timeout_s: float = TIMEOUT_S,
    ) -> oip.ModelInferResponse:
        return self.call(OIP + "ModelInfer", request, oip.ModelInferResponse, metadata, timeout_s)

    def infer_later(self, request: oip.ModelInferRequest, timeout_s: float = TIMEOUT_S) -> Any:
        """A future of the answer's bytes."""
        method = self.channel.unary_unary(OIP + "ModelInfer")
        return method.future(request.SerializeToString(), timeout=timeout_s)

    def labels(self, name: str, timeout_s: float = TIMEOUT_S) -> list[int]:
        """What an iris model says about two flowers."""
        return label_of(self.infer(flowers(name), timeout_s=timeout_s))

    def apply(self, manifest: Mapping[str, Any], *, load_now: bool = False) -> admin.ApplyResponse:
        request = admin.ApplyRequest(manifest_json=json.dumps(manifest), load_now=load_now)
        return self.call(ADMIN + "Apply", request, admin.ApplyResponse)

    def delete(self, name: str) -> bool:
        reply = self.call(ADMIN + "Delete", admin.DeleteRequest(name=name), admin.DeleteResponse)
        return bool(reply.existed)

    def describe(self, name: str) -> dict[str, Any]:
        reply = self.call(
            ADMIN + "Describe", admin.DescribeRequest(name=name), admin.DescribeResponse
        )
        described: dict[str, Any] = json.loads(reply.json)
        return described

    def rows(self, kind: str = "models") -> dict[str, dict[str, Any]]:
        """What ``mesh get`` shows, by name."""
        reply = self.call(ADMIN + "List", admin.ListRequest(kind=kind), admin.ListResponse)
        key = "name" if kind == "models" else "instance_id"
        return {row[key]: row for row in json.loads(reply.items_json)}

    def refused(
        self, request: oip.ModelInferRequest, metadata: Metadata = ()
    ) -> tuple[grpc.StatusCode, str]:
        """(code, message) of a request that must fail."""
        error = failure_of(lambda: self.infer(request, metadata))
        return error.code(), error.details() or ""


def failure_of(ask: Callable[[], object]) -> Any:
    """The RpcError that ``ask`` raises; it fails the test to have an answer."""
    try:
        answer = ask()
    except grpc.RpcError as error:
        return error
    raise AssertionError(f"an error was expected, and the answer was: {str(answer)[:500]}")


def raw_request(name: str, **inputs: Array) -> oip.ModelInferRequest:
    """Arrays as raw tensors."""
    kinds = {"f2": "FP16", "f4": "FP32", "f8": "FP64", "i8": "INT64", "i4": "INT32"}
    request = oip.ModelInferRequest(model_name=name)
    for tensor_name, array in inputs.items():
        request.inputs.add(name=tensor_name, datatype=kinds[array.dtype.str[1:]], shape=array.shape)
        request.raw_input_contents.append(array.tobytes())
    return request


def flowers(name: str) -> oip.ModelInferRequest:
    request = raw_request(name, input=FLOWERS)
    request.outputs.add(name="label")
    return request


def typed_flowers(name: str) -> oip.ModelInferRequest:
    request = oip.ModelInferRequest(model_name=name)
    tensor = request.inputs.add(name="input", datatype="FP32", shape=FLOWERS.shape)
    tensor.contents.fp32_contents.extend(FLOWERS.reshape(-1).tolist())
    request.outputs.add(name="label")
    return request


def label_of(reply: oip.ModelInferResponse) -> list[int]:
    at = [output.name for output in reply.outputs].index("label")
    if reply.raw_output_contents:
        return [int(v) for v in np.frombuffer(reply.raw_output_contents[at], np.int64)]
    return list(reply.outputs[at].contents.int64_contents)


def isvc(
    name: str, uri: str, model_format: str = "onnx", annotations: Mapping[str, str] | None = None
) -> dict[str, Any]:
    """An InferenceService."""
    return {
        "apiVersion": "serving.kserve.io/v1beta1",
        "kind": "InferenceService",
        "metadata": {"name": name, "annotations": dict(annotations or {})},
        "spec": {
            "predictor": {"model": {"modelFormat": {"name": model_format}, "storageUri": uri}}
        },
    }


# ---- HTTP ----


def http_ask(
    address: str,
    method: str,
    path: str,
    body: bytes | None = None,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, dict[str, str], bytes]:
    """(status, headers in lower case, body)"""
    host, _, port = address.rpartition(":")
    connection = http.client.HTTPConnection(host, int(port), timeout=TIMEOUT_S)
    try:
        connection.request(method, path, body, dict(headers or {}))
        reply = connection.getresponse()
        return reply.status, {k.lower(): v for k, v in reply.getheaders()}, reply.read()
    finally:
        connection.close()


def rest(address: str, method: str, path: str, document: Any = None) -> tuple[int, Any]:
    """(status, decoded body)"""
    body = None if document is None else json.dumps(document).encode()
    status, _, answer = http_ask(
        address, method, path, body, {"content-type": "application/json"} if body else {}
    )
    return status, json.loads(answer) if answer else None


# ---- metrics ----

_SAMPLE = re.compile(r"^(\w+)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def scrape(address: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    """Every sample of one /metrics page, by the sample's name."""
    status, _, body = http_ask(address, "GET", "/metrics")
    assert status == 200
    samples: dict[str, list[tuple[dict[str, str], float]]] = {}
    # Not by prometheus_client's parser: that adds ``_total`` to the names of bare counters.
    for name, labels, value in _SAMPLE.findall(body.decode()):
        samples.setdefault(name, []).append((dict(_LABEL.findall(labels)), float(value)))
    return samples


def total(addresses: Sequence[str], name: str, **labels: str) -> float:
    """The sum of a series over processes, of the samples that have these labels."""
    return sum(
        value
        for address in addresses
        for found, value in scrape(address).get(name, [])
        if labels.items() <= found.items()
    )


def routers_of(mesh: LiveMesh) -> list[str]:
    return list(mesh.state["router_metrics"])


def instances_of(mesh: LiveMesh) -> list[str]:
    return list(mesh.state["instance_metrics"])


def eventually(condition: Callable[[], bool], what: str, within_s: float = TIMEOUT_S) -> None:
    """Ask again and again, within a bound: what is waited for happens in other processes."""
    end = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < end, f"no sign of {what}"
        time.sleep(0.05)
