"""gRPC server on asyncio: message-level handlers and frame-level relays on one listener.

INTERFACE (being implemented): handlers are called in the event loop, synchronously. No task is made
per call unless a handler wants one (``AsyncUnary``, ``Streaming``).
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from mesh.core.errors import Code, MeshError
from mesh.wire.head import RequestHead
from mesh.wire.limits import PUBLIC, Limits

Metadata = Sequence[tuple[str, str | bytes]]


class ServerCall(Protocol):
    """One call as a handler sees it."""

    head: RequestHead
    deadline_s: float  # in ``loop.time()``; inf when there is none
    cancelled: bool  # peer reset the stream, went away, or the deadline passed
    on_cancel: Callable[[], None] | None

    def reply(self, message: bytes, *, initial: Metadata = (), trailers: Metadata = ()) -> None:
        """The unary answer: headers, message and trailers in one write. No-op when cancelled."""
        ...

    def fail(
        self, error: MeshError, *, trailers: Metadata = ()
    ) -> None:
        """Trailers-only status from a MeshError (``grpc-retry-pushback-ms`` included)."""
        ...

    def fail_code(self, code: Code, message: str, *, trailers: Metadata = ()) -> None: ...


class StreamCall(ServerCall, Protocol):
    """A call with a stream of messages in each direction."""

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Messages until the client half-closes. Raises ``Cancelled`` errors as MeshError."""
        ...

    async def send(self, message: bytes) -> None:
        """Waits while the peer's window is closed."""
        ...


@dataclass(frozen=True, slots=True)
class Unary:
    """``handler(call, message)`` answers through ``call``, at once or later.

    ``accept(head)`` runs when the headers are there, before the body: an error (and its trailers)
    refuses the call; accepting grants the stream a large window.
    """

    handler: Callable[[ServerCall, bytes], None]
    accept: Callable[[RequestHead], tuple[MeshError, Metadata] | None] | None = None


@dataclass(frozen=True, slots=True)
class AsyncUnary:
    """A coroutine per call: for what is rare. A MeshError that it raises becomes the status."""

    handler: Callable[[ServerCall, bytes], Awaitable[bytes]]


@dataclass(frozen=True, slots=True)
class Streaming:
    """A coroutine per call with messages both ways; returning ends with OK."""

    handler: Callable[[StreamCall], Awaitable[None]]
    accept: Callable[[RequestHead], tuple[MeshError, Metadata] | None] | None = None


Method = Unary | AsyncUnary | Streaming


class Server:
    """``methods`` maps a full path (``/pkg.Service/Method``) to its method; ``fallback`` (a
    ``mesh.wire.relay.Relay``) takes every other path; without it they are UNIMPLEMENTED."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        *,
        limits: Limits = PUBLIC,
        fallback: object | None = None,
    ) -> None:
        raise NotImplementedError

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        reuse_port: bool = False,
        ssl_context: ssl.SSLContext | None = None,
    ) -> int:
        """Listen; returns the port."""
        raise NotImplementedError

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting, GOAWAY, wait for the calls in flight, then close."""
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
