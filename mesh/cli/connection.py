"""The command line's connection to a router: raw bytes over grpcio, errors as ``CommandError``.

One channel a command. A call that fails becomes one line: what the mesh said (exit 1) or why it
could not be reached (exit 3). No protobuf services are registered: methods are named by their
path.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import grpc

from mesh.cli.exits import CommandError, Exit
from protos import mesh_admin_pb2 as admin_pb2

ADMIN: Final = "/mesh.admin.v1.Admin/"
MODEL_INFER: Final = "/inference.GRPCInferenceService/ModelInfer"
# How long a connection may take: a mesh on another continent answers within a second.
CONNECT_TIMEOUT_S: Final = 5.0
# Lists of a hundred thousand models are tens of megabytes; the mesh bounds its own answers.
_MESSAGE_MAX_BYTES: Final = 256 << 20

# What grpcio says when the connection, and not the mesh, is at fault.
_LOST: Final = (
    "failed to connect",
    "socket closed",
    "connection reset",
    "connection refused",
    "name resolution failure",
    "dns resolution failed",
    "broken pipe",
    "handshake",
    "http1.x server",
)


@dataclass(frozen=True, slots=True)
class Target:
    """Where the mesh is, and how to speak to it."""

    address: str
    tls: bool = False
    tls_ca: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None
    tls_server_name: str = ""


class Connection:
    """An open channel, as a context manager. Threads may share it."""

    def __init__(self, target: Target, connect_timeout_s: float = CONNECT_TIMEOUT_S) -> None:
        """Raises CommandError when nothing listens there."""
        self._target = target
        # A plain connection first: it tells within milliseconds, and in plain words, what a
        # channel tells late and at length.
        if fault := _socket_fault(target, connect_timeout_s):
            raise _unreachable(target, fault)
        self._channel = _open_channel(target)

    def __enter__(self) -> Connection:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._channel.close()

    def call(
        self,
        path: str,
        request: bytes,
        *,
        timeout_s: float,
        metadata: Sequence[tuple[str, str]] = (),
    ) -> bytes:
        """One unary call. Raises CommandError."""
        method = self._channel.unary_unary(path)
        try:
            reply: bytes = method(request, timeout=timeout_s, metadata=tuple(metadata))
        except grpc.RpcError as error:
            raise self._explain(error, timeout_s) from error
        return reply

    def apply(
        self, manifest_json: str, *, load_now: bool, timeout_s: float
    ) -> admin_pb2.ApplyResponse:
        request = admin_pb2.ApplyRequest(manifest_json=manifest_json, load_now=load_now)
        reply = self._admin("Apply", request, timeout_s)
        return admin_pb2.ApplyResponse.FromString(reply)

    def list(self, kind: str, names: Sequence[str] = (), *, timeout_s: float) -> str:
        """A JSON array, see ``mesh.admin_views``. ``names``: of these there are more, maybe."""
        reply = self._admin("List", admin_pb2.ListRequest(kind=kind, names=names), timeout_s)
        return admin_pb2.ListResponse.FromString(reply).items_json

    def describe(self, name: str, *, timeout_s: float) -> str:
        reply = self._admin("Describe", admin_pb2.DescribeRequest(name=name), timeout_s)
        return admin_pb2.DescribeResponse.FromString(reply).json

    def delete(self, name: str, *, timeout_s: float) -> bool:
        """Whether it existed."""
        reply = self._admin("Delete", admin_pb2.DeleteRequest(name=name), timeout_s)
        return admin_pb2.DeleteResponse.FromString(reply).existed

    def delete_runtime(self, name: str, kind: str, *, timeout_s: float) -> bool:
        """Whether it existed. ``kind``: "" for either."""
        request = admin_pb2.DeleteRuntimeRequest(name=name, kind=kind)
        reply = self._admin("DeleteRuntime", request, timeout_s)
        return admin_pb2.DeleteResponse.FromString(reply).existed

    def forget_failures(self, *, timeout_s: float) -> int:
        """Have what failed to load tried again; how many models that were."""
        reply = self._admin("ForgetFailures", admin_pb2.ForgetFailuresRequest(), timeout_s)
        return admin_pb2.ForgetFailuresResponse.FromString(reply).models

    def explain(self, name: str, *, timeout_s: float) -> str:
        reply = self._admin("Explain", admin_pb2.ExplainRequest(name=name), timeout_s)
        return admin_pb2.ExplainResponse.FromString(reply).json

    def decisions(self, name: str, *, limit: int, since_ms: int, timeout_s: float) -> str:
        request = admin_pb2.DecisionsRequest(name=name, limit=limit, since_ms=since_ms)
        reply = self._admin("Decisions", request, timeout_s)
        return admin_pb2.DecisionsResponse.FromString(reply).json

    def get_policy(self, *, timeout_s: float) -> str:
        reply = self._admin("GetPolicy", admin_pb2.GetPolicyRequest(), timeout_s)
        return admin_pb2.PolicyResponse.FromString(reply).json

    def set_policy(
        self, overrides_json: str, unset: Sequence[str], *, reset: bool, timeout_s: float
    ) -> str:
        request = admin_pb2.SetPolicyRequest(
            overrides_json=overrides_json, unset=unset, reset=reset
        )
        reply = self._admin("SetPolicy", request, timeout_s)
        return admin_pb2.PolicyResponse.FromString(reply).json

    def get_type_constraints(self, *, timeout_s: float) -> str:
        request = admin_pb2.GetTypeConstraintsRequest()
        reply = self._admin("GetTypeConstraints", request, timeout_s)
        return admin_pb2.TypeConstraintsResponse.FromString(reply).json

    def set_type_constraints(self, constraints_json: str, *, timeout_s: float) -> str:
        request = admin_pb2.SetTypeConstraintsRequest(json=constraints_json)
        reply = self._admin("SetTypeConstraints", request, timeout_s)
        return admin_pb2.TypeConstraintsResponse.FromString(reply).json

    def _admin(self, method: str, request: Any, timeout_s: float) -> bytes:
        return self.call(ADMIN + method, request.SerializeToString(), timeout_s=timeout_s)

    def _explain(self, error: grpc.RpcError, timeout_s: float) -> CommandError:
        code: grpc.StatusCode = error.code()
        details = (error.details() or "").strip() or "no further detail"
        if code is grpc.StatusCode.UNAVAILABLE and any(w in details.lower() for w in _LOST):
            return self._lost(details)
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            return CommandError(
                f"no answer from {self._target.address} within {timeout_s:g} s ({details}); "
                "give it longer with --timeout",
                Exit.TIMED_OUT,
            )
        if code is grpc.StatusCode.UNIMPLEMENTED:
            return CommandError(
                f"what answers at {self._target.address} does not know this command ({details}); "
                "is it a router of this mesh, and of this version?"
            )
        return CommandError(f"{code.name}: {details}")

    def _lost(self, details: str) -> CommandError:
        fault = _socket_fault(self._target, CONNECT_TIMEOUT_S)
        advice = (
            "perhaps it wants no TLS, or another certificate"
            if self._target.tls
            else "perhaps it wants TLS (--tls-ca FILE)"
        )
        return _unreachable(self._target, fault or f"the connection broke ({details}); {advice}")


def _open_channel(target: Target) -> grpc.Channel:
    options: list[tuple[str, Any]] = [
        ("grpc.max_receive_message_length", _MESSAGE_MAX_BYTES),
        ("grpc.max_send_message_length", _MESSAGE_MAX_BYTES),
        # A proxy from the environment is for the outside world; the mesh is addressed directly.
        ("grpc.enable_http_proxy", 0),
    ]
    if not target.tls:
        return grpc.insecure_channel(target.address, options=options)
    if target.tls_server_name:
        options.append(("grpc.ssl_target_name_override", target.tls_server_name))
    credentials = grpc.ssl_channel_credentials(
        root_certificates=_read(target.tls_ca, "--tls-ca"),
        private_key=_read(target.tls_key, "--tls-key"),
        certificate_chain=_read(target.tls_cert, "--tls-cert"),
    )
    return grpc.secure_channel(target.address, credentials, options=options)


def _read(path: Path | None, flag: str) -> bytes | None:
    if path is None:
        return None
    try:
        return path.read_bytes()
    except OSError as error:
        raise CommandError(f"{flag}: cannot read {path}: {error.strerror}", Exit.USAGE) from error


def _unreachable(target: Target, reason: str) -> CommandError:
    return CommandError(
        f"cannot reach the mesh at {target.address}: {reason}; "
        "is it up (`mesh up`), and is the address right (--address or MESH_ADDRESS)?",
        Exit.UNREACHABLE,
    )


def _socket_fault(target: Target, timeout_s: float) -> str:
    """Why nothing can be connected to at the address; "" when something listens there."""
    host, colon, port = target.address.rpartition(":")
    if not colon or not port.isdigit() or not 0 < int(port) < 65_536:
        return "the address is not HOST:PORT"
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=timeout_s).close()
    except TimeoutError:
        return f"no answer within {timeout_s:g} s"
    except (OSError, UnicodeError) as error:
        return getattr(error, "strerror", None) or str(error)
    return ""
