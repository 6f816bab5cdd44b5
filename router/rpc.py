"""From protobuf messages to coroutines: what every local method of the router has around it.

A message that is not one is INVALID_ARGUMENT, a store that is away is UNAVAILABLE with a text that
says what could not be done, and every call is measured like a relayed one.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from time import monotonic

from google.protobuf.message import DecodeError, Message

from mesh.catalog import store_away
from mesh.core.errors import Code, InvalidArgument, MeshError
from mesh.metrics import RouterMetrics
from mesh.store.api import StoreUnavailable
from mesh.wire.server import AsyncUnary, ServerCall

Rpcs = dict[str, tuple[type[Message], Callable[..., Awaitable[Message]]]]


def methods_of(service: str, rpcs: Rpcs, metrics: RouterMetrics) -> dict[str, AsyncUnary]:
    """Full path to method, of one service's rpcs by their short names."""
    table: dict[str, AsyncUnary] = {}
    for rpc, (request_type, handler) in rpcs.items():
        path = f"/{service}/{rpc}"
        table[path] = unary(path, request_type, handler, metrics)
    return table


def unary(
    path: str,
    request_type: type[Message],
    handler: Callable[..., Awaitable[Message]],
    metrics: RouterMetrics,
) -> AsyncUnary:
    """A method of the server from a coroutine over messages."""

    async def handle(call: ServerCall, message: bytes) -> bytes:
        started_s = monotonic()
        code, reply = int(Code.UNKNOWN), b""
        try:
            reply = (await handler(_parsed(request_type, message, path))).SerializeToString()
            code = int(Code.OK)
            return reply
        except StoreUnavailable as error:
            code = int(error.code)
            raise store_away(error, path) from error
        except MeshError as error:
            code = int(error.code)
            raise
        finally:
            duration_ms = (monotonic() - started_s) * 1_000.0
            metrics.request_done(path, code, duration_ms, len(message), len(reply))

    return AsyncUnary(handle)


def _parsed(request_type: type[Message], message: bytes, path: str) -> Message:
    try:
        return request_type.FromString(message)
    except DecodeError as error:
        raise InvalidArgument(
            f"{path}: the request is not a {request_type.DESCRIPTOR.name}: {error}"
        ) from error
