"""gRPC client on asyncio: one long-lived connection to one peer, re-made when it breaks.

INTERFACE (being implemented).
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass

from mesh.core.errors import Code, MeshError
from mesh.wire.limits import INSIDE, Limits

Metadata = Sequence[tuple[str, str | bytes]]


class RpcError(MeshError):
    """The peer's status (or a local UNAVAILABLE / DEADLINE_EXCEEDED). ``trailers`` as received."""

    def __init__(
        self, code: Code, message: str, trailers: tuple[tuple[bytes, bytes], ...] = ()
    ) -> None:
        super().__init__(message, code=code)
        self.trailers = trailers


@dataclass(frozen=True, slots=True)
class Reply:
    message: bytes
    initial: tuple[tuple[bytes, bytes], ...]
    trailers: tuple[tuple[bytes, bytes], ...]


class ClientStream:
    async def send(self, message: bytes) -> None:
        raise NotImplementedError

    def half_close(self) -> None:
        raise NotImplementedError

    def __aiter__(self) -> AsyncIterator[bytes]:
        """Messages until the peer ends; a status other than OK is raised as RpcError."""
        raise NotImplementedError

    def cancel(self) -> None:
        raise NotImplementedError


class Channel:
    def __init__(
        self, address: str, *, limits: Limits = INSIDE, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        raise NotImplementedError

    async def unary(
        self, path: str, message: bytes, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Reply:
        raise NotImplementedError

    def stream(
        self, path: str, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> ClientStream:
        raise NotImplementedError

    async def close(self) -> None:
        raise NotImplementedError
