"""gRPC over HTTP/2: length-prefixed messages, status blocks, compression.

Pure: bytes in, bytes out. Limits are the caller's; what is over them raises ResourceExhausted
before anything of that size is allocated.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import Final
from urllib.parse import unquote

from mesh.core.errors import Code, Internal, MeshError, ResourceExhausted, Unimplemented
from mesh.wire import hpack

Metadata = Sequence[tuple[str, str | bytes]]
Buffer = bytes | memoryview

PREFIX_BYTES: Final = 5
OK_HEADERS: Final = hpack.encode(
    [
        (b":status", b"200"),
        (b"content-type", b"application/grpc"),
        (b"grpc-accept-encoding", b"identity,deflate,gzip"),
    ]
)
OK_TRAILERS: Final = hpack.encode([(b"grpc-status", b"0")])
_TRAILERS_ONLY: Final = hpack.encode([(b":status", b"200"), (b"content-type", b"application/grpc")])
_MESSAGE_MAX_BYTES: Final = 4_096  # grpcio takes no more than 8 KiB of trailers
_WBITS: Final = {b"gzip": 31, b"deflate": 15}


def prefix(message: bytes) -> bytes:
    """The five bytes before an uncompressed message."""
    return b"\0" + len(message).to_bytes(4, "big")


def percent_encode(message: str) -> bytes:
    """``grpc-message``: printable ASCII stays, the rest and "%" become %XX of its UTF-8."""
    plain = message.isascii() and message.isprintable() and message == message.strip(" ")
    if plain and "%" not in message and len(message) <= _MESSAGE_MAX_BYTES:
        return message.encode("ascii")
    out = bytearray()
    for char in message[:_MESSAGE_MAX_BYTES]:
        piece = b"".join(
            b"%%%02X" % octet if octet < 0x20 or octet > 0x7E or octet == 0x25 else bytes((octet,))
            for octet in char.encode("utf-8", "replace")
        )
        if len(out) + len(piece) > _MESSAGE_MAX_BYTES:
            break
        out += piece
    # A field value has no space at its ends (RFC 9113, 8.2.1).
    if out[:1] == b" ":
        out[:1] = b"%20"
    if out[-1:] == b" ":
        out[-1:] = b"%20"
    return bytes(out)


def percent_decode(message: bytes) -> str:
    return unquote(message.decode("ascii", "replace"), errors="replace")


def encode_metadata(metadata: Metadata | Iterable[tuple[str, str | bytes]]) -> bytes:
    """Fields of call metadata. ``-bin`` values are given as bytes already in base64."""
    return hpack.encode(
        (name.encode("ascii"), value.encode("utf-8") if isinstance(value, str) else value)
        for name, value in metadata
    )


def status_fields(code: int, message: str) -> bytes:
    fields = [(b"grpc-status", b"%d" % code)]
    if message:
        fields.append((b"grpc-message", percent_encode(message)))
    return hpack.encode(fields)


def error_trailers(error: MeshError, trailers: Metadata = ()) -> bytes:
    """Trailers of a MeshError, its retry hint included."""
    block = status_fields(error.code, error.message)
    if error.retry_after_ms is not None and error.retryable:
        block += hpack.encode_literal(b"grpc-retry-pushback-ms", b"%d" % error.retry_after_ms)
    return block + encode_metadata(trailers) if trailers else block


def trailers_only(block: bytes) -> bytes:
    """A reply that is nothing but trailers: ``block`` behind the response headers."""
    return _TRAILERS_ONLY + block


def check_size(length: int, limit: int) -> None:
    if length > limit:
        raise ResourceExhausted(
            f"message of {length} bytes is larger than the limit of {limit} bytes"
        )


def decompress(data: Buffer, encoding: bytes, limit: int) -> bytes:
    """Undo ``grpc-encoding``. Raises Unimplemented, ResourceExhausted or Internal (broken data)."""
    if encoding == b"identity":
        raise Internal("a message is flagged as compressed, but grpc-encoding names no compression")
    wbits = _WBITS.get(encoding)
    if wbits is None:
        raise Unimplemented(
            f"grpc-encoding {encoding[:32].decode('ascii', 'replace')!r} is not supported; "
            "use identity, gzip or deflate"
        )
    inflater = zlib.decompressobj(wbits)
    try:
        out = inflater.decompress(data, limit + 1)
    except zlib.error as error:
        raise Internal(f"a compressed message cannot be decompressed: {error}") from None
    check_size(len(out), limit)
    if not inflater.eof:
        raise Internal("a compressed message is cut short")
    if inflater.unused_data:
        raise Internal("bytes stand behind the end of a compressed message")
    return out


class Assembler:
    """Cuts a stream of bytes into messages.

    ``feed`` returns the messages that are complete now. Memory is taken as bytes come: five bytes
    that announce a large message cost nothing.
    """

    __slots__ = ("_body", "_compressed", "_encoding", "_left", "_limit", "_prefix")

    def __init__(self, limit: int, encoding: bytes) -> None:
        self._limit = limit
        self._encoding = encoding
        self._prefix = bytearray()
        self._body: bytearray | None = None
        self._left = 0
        self._compressed = False

    def feed(self, data: Buffer) -> list[bytes]:
        """Raises ResourceExhausted, Unimplemented or Internal."""
        messages: list[bytes] = []
        position, end = 0, len(data)
        while True:
            if self._body is None:
                take = min(PREFIX_BYTES - len(self._prefix), end - position)
                self._prefix += data[position : position + take]
                position += take
                if len(self._prefix) < PREFIX_BYTES:
                    return messages
                self._open()
            body = self._body
            assert body is not None
            take = min(self._left, end - position)
            if take:
                body += data[position : position + take]
                self._left -= take
                position += take
            if self._left:
                return messages
            messages.append(self._close(body))
            if position == end:
                return messages

    def _open(self) -> None:
        flag = self._prefix[0]
        if flag > 1:
            raise Internal(f"message prefix has the unknown flag {flag}")
        length = int.from_bytes(self._prefix[1:5], "big")
        check_size(length, self._limit)
        self._compressed = flag == 1
        self._body = bytearray()
        self._left = length
        self._prefix.clear()

    def _close(self, body: bytearray) -> bytes:
        self._body = None
        if self._compressed:
            return decompress(bytes(body), self._encoding, self._limit)
        return bytes(body)

    @property
    def incomplete(self) -> bool:
        """Inside a message."""
        return self._body is not None or bool(self._prefix)


def code_of(status: int | None, http_status: int | None) -> Code:
    """The gRPC code of a reply, also of one that is not gRPC's (by its HTTP status)."""
    if status is not None:
        return Code(status) if 0 <= status <= 16 else Code.UNKNOWN
    by_http = {
        400: Code.INTERNAL,
        401: Code.UNAUTHENTICATED,
        403: Code.PERMISSION_DENIED,
        404: Code.UNIMPLEMENTED,
        429: Code.UNAVAILABLE,
        502: Code.UNAVAILABLE,
        503: Code.UNAVAILABLE,
        504: Code.UNAVAILABLE,
    }
    return by_http.get(http_status or 0, Code.UNKNOWN)
