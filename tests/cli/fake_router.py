"""A gRPC server that answers from a script as a router's admin service would, over real sockets."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import grpc

from protos import mesh_admin_pb2 as pb
from protos import oip_pb2

Answer = bytes | tuple[grpc.StatusCode, str]


@dataclass(slots=True)
class FakeRouter:
    """``answers[method]`` is a function of the request; ``calls`` is what was asked."""

    answers: dict[str, Callable[[bytes], Answer]] = field(default_factory=dict)
    calls: list[tuple[str, bytes]] = field(default_factory=list)
    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    server: grpc.Server | None = None
    address: str = ""

    def start(self, credentials: grpc.ServerCredentials | None = None) -> None:
        # Another server on the same port must be an error, not a second listener.
        options = [("grpc.so_reuseport", 0)]
        self.server = grpc.server(ThreadPoolExecutor(4), options=options)
        self.server.add_generic_rpc_handlers((_Handler(self),))
        if credentials is None:
            port = self.server.add_insecure_port("127.0.0.1:0")
        else:
            port = self.server.add_secure_port("127.0.0.1:0", credentials)
        self.address = f"127.0.0.1:{port}"
        self.server.start()
        self.answers.setdefault("List", self._list)

    def stop(self) -> None:
        if self.server is not None:
            self.server.stop(grace=None).wait(10)

    def requests(self, method: str) -> list[bytes]:
        return [request for name, request in self.calls if name == method]

    def _list(self, request: bytes) -> bytes:
        kind = pb.ListRequest.FromString(request).kind
        return pb.ListResponse(items_json=json.dumps(self.rows.get(kind, []))).SerializeToString()


class _Handler(grpc.GenericRpcHandler):  # type: ignore[misc]
    def __init__(self, router: FakeRouter) -> None:
        self._router = router

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        name = details.method.rpartition("/")[2]
        answer = self._router.answers.get(name)
        if answer is None:
            return None  # UNIMPLEMENTED

        def handle(request: bytes, context: grpc.ServicerContext) -> bytes:
            self._router.calls.append((name, request))
            result = answer(request)
            if isinstance(result, bytes):
                return result
            context.abort(*result)
            raise AssertionError("abort raises")

        return grpc.unary_unary_rpc_method_handler(handle)


def accept_all(actions: dict[str, str] | None = None) -> Callable[[bytes], Answer]:
    """Apply that takes everything; ``actions`` by name, else created."""

    def apply(request: bytes) -> bytes:
        manifest = json.loads(pb.ApplyRequest.FromString(request).manifest_json)
        name = manifest["metadata"]["name"]
        action = (actions or {}).get(name, "created")
        reply = pb.ApplyResponse(name=name, model_id=f"{name}__isvc-0123456789", action=action)
        if "odd" in manifest.get("spec", {}):
            reply.warnings.append("spec.odd: unknown field, ignored")
        return reply.SerializeToString()

    return apply


def echo_infer(request: bytes) -> bytes:
    """Every input comes back as an output of the same bytes, under the name OUT_<input>."""
    asked = oip_pb2.ModelInferRequest.FromString(request)
    reply = oip_pb2.ModelInferResponse(model_name=asked.model_name, id=asked.id)
    for tensor, raw in zip(asked.inputs, asked.raw_input_contents, strict=True):
        reply.outputs.add(
            name=f"OUT_{tensor.name}", datatype=tensor.datatype, shape=list(tensor.shape)
        )
        reply.raw_output_contents.append(raw)
    return reply.SerializeToString()
