"""Calls that the router makes for others by whole messages: REST bodies and its own questions.

A ``GatewayCall`` is a ``Call`` like a relayed one: the dispatcher routes it, has its model loaded,
retries it elsewhere and counts it. What differs is who carries the bytes: here one unary call over
the instance's channel.

Every call of this kind is taken to be idempotent: it is sent again when an instance is lost before
its answer has come. ``Gateway.call`` raises the error that the client is to see; cancelling it
cancels the call. What bounds it: ``max_calls`` at once and ``max_held_bytes`` of request bodies
(RESOURCE_EXHAUSTED past them), and the deadline.
"""

from __future__ import annotations

import asyncio
import math
from dataclasses import dataclass
from time import monotonic
from typing import Any, Final

from mesh.core.errors import (
    Code,
    DeadlineExceeded,
    MeshError,
    ResourceExhausted,
    Unavailable,
)
from mesh.wire.client import NotSent, PeerSilent, Reply, RpcError
from mesh.wire.messages import Metadata
from mesh.wire.relay import Failure, Upstream
from router.dispatch import Dispatcher, copy_of
from router.peers import Peers

# Bodies are up to max_message_bytes each; the bound on their sum is what protects the process.
MAX_CALLS: Final = 2_048
MAX_HELD_BYTES: Final = 256 * 1024 * 1024
BUSY_RETRY_MS: Final = 500

_MESH_ERRORS: Final = {
    b"not-here": Failure.NOT_HERE,
    b"draining": Failure.DRAINING,
    b"overloaded": Failure.OVERLOADED,
}


@dataclass(frozen=True, slots=True)
class GatewayHead:
    """``path`` is what metrics call the request."""

    path: str


class GatewayCall:
    """One call on its way. Made by ``Gateway`` only."""

    __slots__ = (
        "_attempt",
        "_message",
        "_metadata",
        "_path",
        "_peers",
        "answer",
        "attempts",
        "context",
        "deadline_s",
        "dispatcher",
        "head",
        "model_name",
        "request_bytes",
        "response_bytes",
        "started_s",
    )

    def __init__(
        self,
        dispatcher: Dispatcher,
        peers: Peers,
        path: str,
        model_name: str,
        message: bytes,
        metadata: Metadata,
        deadline_s: float,
        label: str,
    ) -> None:
        self.dispatcher = dispatcher
        self.head = GatewayHead(label)
        self.model_name = model_name
        self.deadline_s = deadline_s
        self.started_s = monotonic()
        self.attempts = 0
        self.request_bytes = len(message)
        self.response_bytes = 0
        self.context: Any = None
        self.answer: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._peers = peers
        self._path = path
        self._message = message
        self._metadata = metadata
        self._attempt: asyncio.Task[None] | None = None

    # ---- the dispatcher's orders ----------------------------------------------------------------

    def forward(self, upstream: Upstream, model_id_field: bytes) -> None:
        self.attempts += 1
        self._attempt = asyncio.get_running_loop().create_task(self._try(upstream))

    def fail(self, error: MeshError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)
            self._over(int(error.code))

    # ---- the carrier's side ---------------------------------------------------------------------

    def abandon(self, code: Code) -> None:
        """The client went away, or the deadline passed."""
        if not self.answer.done():
            self.answer.cancel()
            self._over(int(code))

    def _over(self, code: int) -> None:
        attempt = self._attempt
        if attempt is not None and attempt is not asyncio.current_task():
            attempt.cancel()
        self.dispatcher.done(self, code, monotonic())

    async def _try(self, upstream: Upstream) -> None:
        copy = copy_of(self)
        left_s = self.deadline_s - monotonic()
        try:
            reply = await self._peers.channel(copy.instance_id).unary(
                self._path,
                self._message,
                metadata=(("mm-model-id", copy.model_id), *self._metadata),
                timeout_s=None if left_s == math.inf else max(0.001, left_s),
            )
        except MeshError as error:
            if self.answer.done():
                return
            failure = failure_of(error)
            if failure is None:
                self.fail(_plain(error))
            else:
                self.dispatcher.failed(self, upstream, failure)
            return
        if not self.answer.done():
            self.response_bytes = len(reply.message)
            self.answer.set_result(reply)
            self._over(int(Code.OK))


class Gateway:
    """See the module's docstring."""

    def __init__(
        self,
        dispatcher: Dispatcher,
        peers: Peers,
        *,
        max_calls: int = MAX_CALLS,
        max_held_bytes: int = MAX_HELD_BYTES,
    ) -> None:
        self._dispatcher = dispatcher
        self._peers = peers
        self._max_calls = max_calls
        self._max_held_bytes = max_held_bytes
        self._calls = 0
        self._held_bytes = 0

    @property
    def inflight(self) -> int:
        return self._calls

    async def call(
        self,
        path: str,
        model_name: str,
        message: bytes,
        *,
        metadata: Metadata = (),
        timeout_s: float | None = None,
        label: str | None = None,
    ) -> Reply:
        """Have ``model_name`` answer ``message`` at ``path``. Raises MeshError.

        ``label`` is the path that metrics count it under, ``path`` when None.
        """
        if self._calls >= self._max_calls or self._held_bytes + len(message) > self._max_held_bytes:
            raise ResourceExhausted(
                f"{self._calls} requests with {self._held_bytes} bytes are under way: "
                "try again later",
                retry_after_ms=BUSY_RETRY_MS,
            )
        self._calls += 1
        self._held_bytes += len(message)
        deadline_s = math.inf if timeout_s is None else monotonic() + timeout_s
        call = GatewayCall(
            self._dispatcher,
            self._peers,
            path,
            model_name,
            message,
            metadata,
            deadline_s,
            label or path,
        )
        try:
            self._dispatcher.route(call)
            async with asyncio.timeout(timeout_s):
                return await asyncio.shield(call.answer)
        except TimeoutError:
            call.abandon(Code.DEADLINE_EXCEEDED)
            raise DeadlineExceeded(
                f"model {model_name!r} did not answer within {timeout_s:g} s"
            ) from None
        except asyncio.CancelledError:
            call.abandon(Code.CANCELLED)
            raise
        finally:
            self._calls -= 1
            self._held_bytes -= len(message)


def failure_of(error: MeshError) -> Failure | None:
    """What kind of failed attempt an error is; None when it is the model's answer."""
    if isinstance(error, PeerSilent):
        return Failure.SILENT
    if isinstance(error, NotSent):
        return Failure.CONNECT if error.code is Code.UNAVAILABLE else Failure.OVERLOADED
    if not isinstance(error, RpcError):
        return Failure.CONNECT if isinstance(error, Unavailable) else None
    if not error.trailers:  # not the peer's words, but what became of the connection
        return Failure.LOST if error.code is Code.UNAVAILABLE else None
    for name, value in error.trailers:
        if name == b"mesh-error":
            return _MESH_ERRORS.get(value)
    return None


def _plain(error: MeshError) -> MeshError:
    """The instance's answer with its retry hint, without the trailers."""
    hint_ms: int | None = error.retry_after_ms
    for name, value in getattr(error, "trailers", ()):
        if name == b"grpc-retry-pushback-ms" and value.isdigit():
            hint_ms = int(value)
    return MeshError(error.message, code=error.code, retry_after_ms=hint_ms)
