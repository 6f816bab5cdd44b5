"""Decoded header blocks, with what the mesh needs of them taken out once.

Heads are shared by every message of a connection that sends the same block, so they are read-only
but for ``relay_prefix``, which caches what a relay derives from them, and ``opener``, which
a server sets once it knows who takes such requests.

A block that breaks RFC 9113 8.2 and 8.3 raises ``MalformedHead``: a stream error PROTOCOL_ERROR.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable
from typing import Any, Final

Field = tuple[bytes, bytes]

_NAME: Final = re.compile(rb"[!#$%&'*+\-.^_`|~0-9a-z]+\Z")
_BAD_VALUE: Final = re.compile(rb"[\0\r\n]|\A[ \t]|[ \t]\Z")
_HOP_BY_HOP: Final = frozenset(
    {b"connection", b"proxy-connection", b"keep-alive", b"transfer-encoding", b"upgrade"}
)
_PSEUDO_REQUEST: Final = frozenset({b":method", b":scheme", b":authority", b":path"})
# Owned by gRPC or by HTTP: never part of a call's metadata.
_RESERVED: Final = frozenset(
    {b"te", b"content-type", b"grpc-timeout", b"grpc-encoding", b"host", b"content-length"}
)
_TIMEOUT: Final = re.compile(rb"([0-9]{1,8})([HMSmun])\Z")
_UNIT_SECONDS: Final = {b"H": 3600.0, b"M": 60.0, b"S": 1.0, b"m": 1e-3, b"u": 1e-6, b"n": 1e-9}


# Makes the stream of a request: (connection, stream id, head, whether the request has no body).
Opener = Callable[[Any, int, "RequestHead", bool], Any]


class MalformedHead(ValueError):
    """The header block is no valid HTTP/2 message head."""


def parse_timeout(value: bytes) -> float:
    """``grpc-timeout`` (1 to 8 digits and a unit) in seconds. Raises MalformedHead."""
    match = _TIMEOUT.match(value)
    if match is None:
        raise MalformedHead(f"grpc-timeout {value[:32]!r} is not 1 to 8 digits and a unit")
    return int(match[1]) * _UNIT_SECONDS[match[2]]


def format_timeout(seconds: float) -> bytes:
    """The shortest faithful ``grpc-timeout``: at least one unit, rounded down to microseconds."""
    micros = max(1, int(seconds * 1e6))
    if micros < 100_000_000:
        return b"%du" % micros
    millis = micros // 1_000
    if millis < 100_000_000:
        return b"%dm" % millis
    return b"%dS" % min(millis // 1_000, 99_999_999)


def decode_binary(value: bytes) -> bytes:
    """Value of a ``-bin`` header: base64, padding optional. Raises MalformedHead."""
    try:
        return base64.b64decode(value + b"=" * (-len(value) % 4), validate=True)
    except (binascii.Error, ValueError):
        raise MalformedHead("a -bin header is not base64") from None


def _check_regular(name: bytes, value: bytes) -> None:
    if _NAME.match(name) is None:
        raise MalformedHead(f"header name {name[:64]!r} is not a lower-case token")
    if _BAD_VALUE.search(value) is not None:
        raise MalformedHead(f"header {name[:64]!r} holds CR, LF or NUL, or space at an end")
    if name in _HOP_BY_HOP:
        raise MalformedHead(f"header {name!r} is specific to an HTTP/1 connection")
    if name == b"te" and value != b"trailers":
        raise MalformedHead("header te is not 'trailers'")


def _text(value: bytes, name: str) -> str:
    try:
        return value.decode("utf-8")
    except UnicodeDecodeError:
        raise MalformedHead(f"{name} is not UTF-8") from None


class RequestHead:
    """The head of a request.

    ``timeout_s`` is ``grpc-timeout`` in seconds or None. ``metadata`` is everything that is neither
    a pseudo-header nor owned by gRPC or the mesh (``mm-*``, ``mesh-*``), in order. ``model_id`` and
    ``vmodel_id`` come from ``mm-model-id`` and ``mm-vmodel-id`` or their ``-bin`` forms. ``fields``
    is the whole block as received.
    """

    __slots__ = (
        "authority",
        "content_type",
        "encoding",
        "fields",
        "metadata",
        "method",
        "model_id",
        "opener",
        "path",
        "relay_prefix",
        "timeout_s",
        "vmodel_id",
    )

    def __init__(self, fields: tuple[Field, ...]) -> None:
        self.fields = fields
        self.relay_prefix: bytes | None = None
        self.opener: Opener | None = None
        self.timeout_s: float | None = None
        self.encoding = b"identity"
        self.content_type = b""
        self.model_id: str | None = None
        self.vmodel_id: str | None = None
        metadata: list[Field] = []
        pseudo: dict[bytes, bytes] = {}
        regular = False
        for name, value in fields:
            if name[:1] == b":":
                if name not in _PSEUDO_REQUEST or name in pseudo or regular:
                    raise MalformedHead(f"pseudo-header {name[:32]!r} is unknown, twice or late")
                if _BAD_VALUE.search(value) is not None:
                    raise MalformedHead(f"pseudo-header {name!r} holds CR, LF, NUL or outer space")
                pseudo[name] = value
                continue
            regular = True
            _check_regular(name, value)
            if name in _RESERVED:
                self._reserved(name, value)
            elif name.startswith((b"mm-", b"mesh-")):
                self._mesh(name, value)
            else:
                metadata.append((name, value))
        if not {b":method", b":scheme", b":path"} <= pseudo.keys() or not pseudo[b":path"]:
            raise MalformedHead("a request needs :method, :scheme and :path")
        self.method = pseudo[b":method"]
        self.path = _text(pseudo[b":path"], ":path")
        self.authority = pseudo.get(b":authority", b"")
        self.metadata = tuple(metadata)

    def _reserved(self, name: bytes, value: bytes) -> None:
        if name == b"grpc-timeout":
            self.timeout_s = parse_timeout(value)
        elif name == b"grpc-encoding":
            self.encoding = value
        elif name == b"content-type":
            self.content_type = value

    def _mesh(self, name: bytes, value: bytes) -> None:
        if name == b"mm-model-id":
            self.model_id = _text(value, "mm-model-id")
        elif name == b"mm-vmodel-id":
            self.vmodel_id = _text(value, "mm-vmodel-id")
        elif name == b"mm-model-id-bin":
            self.model_id = _text(decode_binary(value), "mm-model-id-bin")
        elif name == b"mm-vmodel-id-bin":
            self.vmodel_id = _text(decode_binary(value), "mm-vmodel-id-bin")

    def get(self, name: bytes) -> bytes | None:
        """The last value of a field, or None."""
        for field_name, value in reversed(self.fields):
            if field_name == name:
                return value
        return None


class ReplyHead:
    """Initial headers, trailers, or both in one (trailers-only) of a reply.

    ``status`` is ``:status`` (None in trailers), ``grpc_status`` the code or None, ``mesh_error``
    the refusal of an instance (ARCHITECTURE.md) or b"".
    """

    __slots__ = ("fields", "grpc_status", "mesh_error", "relay_block", "status")

    def __init__(self, fields: tuple[Field, ...]) -> None:
        self.fields = fields
        self.relay_block: bytes | None = None
        self.status: int | None = None
        self.grpc_status: int | None = None
        self.mesh_error = b""
        regular = False
        for name, value in fields:
            if name[:1] == b":":
                if name != b":status" or self.status is not None or regular:
                    raise MalformedHead(f"pseudo-header {name[:32]!r} is unknown, twice or late")
                if len(value) != 3 or not value.isdigit():
                    raise MalformedHead(":status is not three digits")
                self.status = int(value)
                continue
            regular = True
            _check_regular(name, value)
            if name == b"grpc-status":
                self.grpc_status = int(value) if value.isdigit() and len(value) < 4 else 2
            elif name == b"mesh-error":
                self.mesh_error = value

    def get(self, name: bytes) -> bytes | None:
        """The last value of a field, or None."""
        for field_name, value in reversed(self.fields):
            if field_name == name:
                return value
        return None
