"""gRPC server on asyncio: message-level methods and frame-level relays on one listener.

Handlers are called in the event loop, synchronously. No task is made per call unless a method asks
for one (``AsyncUnary``, ``Streaming``). Fails per connection: what one client does wrong costs its
own connection.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
from collections.abc import Awaitable, Coroutine, Mapping
from functools import partial
from typing import Any, Final, Protocol

from mesh.core.errors import Code, Internal, MeshError, Unimplemented
from mesh.wire.calls import (
    AsyncUnary,
    HttpErrorStream,
    Method,
    RefusedCall,
    ServerCall,
    StreamCall,
    Streaming,
    Unary,
    UnaryCall,
)
from mesh.wire.connection import Connection
from mesh.wire.head import RequestHead
from mesh.wire.limits import PUBLIC, Limits
from mesh.wire.listener import Listener, bind_tcp, bind_unix
from mesh.wire.messages import Metadata
from mesh.wire.outbound import Outbound
from mesh.wire.stream import Stream
from mesh.wire.transport import Link, Pump, pump_of

__all__ = [
    "AsyncUnary",
    "Metadata",
    "Method",
    "Server",
    "ServerCall",
    "StreamCall",
    "Streaming",
    "Unary",
]

log = logging.getLogger(__name__)

# A draining server looks so often whether it is done, and gives up clients that do not answer a
# PING (or a handshake) after so many looks: two seconds.
_LOOK_S: Final = 0.05
_CROSSING_LOOKS: Final = 40


class Fallback(Protocol):
    """Takes calls whose path no method has (a relay)."""

    def new_stream(
        self, conn: Outbound, stream_id: int, head: RequestHead, end: bool
    ) -> Stream | None: ...


class Server:
    """``methods`` maps a full path (``/pkg.Service/Method``) to its method; ``fallback`` takes
    every other path, or ``otherwise`` does; without them they are UNIMPLEMENTED."""

    def __init__(
        self,
        methods: Mapping[str, Method],
        *,
        limits: Limits = PUBLIC,
        fallback: Fallback | None = None,
        otherwise: Method | None = None,
    ) -> None:
        self.methods = dict(methods)
        self._otherwise = otherwise
        self.limits = limits
        self.fallback = fallback
        self._listeners: list[Listener] = []
        self._links: set[Link] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self.draining = False

    async def start(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        reuse_port: bool = False,
        ssl_context: ssl.SSLContext | None = None,
    ) -> int:
        """Listen; returns the port. Raises OSError when the address is taken."""
        sockets = await bind_tcp(host, port, reuse_port=reuse_port)
        self._listen(sockets, ssl_context)
        return self._listeners[-1].port

    async def start_unix(self, path: str) -> None:
        """Listen on a Unix socket."""
        self._listen([bind_unix(path)], None)

    def _listen(self, sockets: list[socket.socket], ssl_context: ssl.SSLContext | None) -> None:
        pump = pump_of(asyncio.get_running_loop())
        for sock in sockets:
            self._listeners.append(
                Listener(
                    sock,
                    lambda: self._link(pump),
                    ssl_context=ssl_context,
                    ssl_handshake_timeout_s=self.limits.tls_timeout_s,
                )
            )

    @property
    def connections(self) -> int:
        return len(self._links)

    @property
    def inflight(self) -> int:
        """Calls that have not ended."""
        return sum(len(link.conn.streams) for link in self._links)

    async def drain(self, timeout_s: float) -> None:
        """Stop accepting, GOAWAY, wait for the calls in flight, then close."""
        self.draining = True
        for listener in self._listeners:
            listener.close()
        for link in list(self._links):
            link.conn.start_drain()
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s
        # Calls that crossed our GOAWAY have come when the client has answered the PING behind it.
        # Connections that waited in the backlog have come up and have been told as well. Both are
        # given up after so many looks without any progress: a clock would count against the
        # clients what this process itself took to accept and read thousands of them.
        looks, before = 0, 0
        while loop.time() < until:
            unsettled = self._unsettled
            looks = looks + 1 if unsettled == before else 0
            before = unsettled
            if not self.inflight and (not unsettled or looks > _CROSSING_LOOKS):
                break
            await asyncio.sleep(min(_LOOK_S, max(0.0, until - loop.time())))
        if self.inflight:
            log.warning("drain: %d calls did not end in %g s", self.inflight, timeout_s)
        await self.close()

    @property
    def _unsettled(self) -> int:
        """Connections that are still coming up, or whose client may not know that we go."""
        return sum(listener.connecting for listener in self._listeners) + sum(
            link.conn.awaits_drain for link in self._links
        )

    async def close(self) -> None:
        """Close everything now."""
        for listener in self._listeners:
            listener.close()
        for link in list(self._links):
            link.close()
        for task in list(self._tasks):
            task.cancel()
        if self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        await asyncio.sleep(0)  # let the transports write their last words
        self._listeners.clear()

    # ------------------------------------------------------------------ Owner

    def _link(self, pump: Pump) -> Link:
        return Link(
            pump,
            lambda now_s: Connection(self, self.limits, client=False, now_s=now_s),
            on_up=self._on_up,
            on_down=self._on_down,
        )

    def _on_up(self, link: Link) -> None:
        if len(self._links) >= self.limits.max_connections:
            link.abort()
            return
        if self.draining:  # it waited in the backlog: what it has sent is served still
            link.conn.start_drain()
        sock = link.transport.get_extra_info("socket") if link.transport else None
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            assert sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
        self._links.add(link)

    def _on_down(self, link: Link, _reason: str) -> None:
        self._links.discard(link)

    def on_goaway(self, conn: Outbound) -> None:
        """A client that goes away finishes what it has; nothing to do."""

    def on_settings(self, conn: Outbound) -> None:
        """Windows are adjusted by the connection itself."""

    def new_stream(
        self, conn: Outbound, stream_id: int, head: RequestHead, end: bool
    ) -> Stream | None:
        if not head.content_type.startswith(b"application/grpc") or head.method != b"POST":
            return self._not_grpc(conn, stream_id, head, end)
        method = self.methods.get(head.path, self._otherwise)
        if isinstance(method, Unary):
            head.opener = partial(self._open_unary, method)
        elif method is not None:
            head.opener = partial(self._open, method)
        elif self.fallback is not None:
            head.opener = self.fallback.new_stream
        else:
            return self._refuse(conn, stream_id, head, end, _unknown(head), ())
        stream: Stream | None = head.opener(conn, stream_id, head, end)
        return stream

    def _open_unary(
        self, method: Unary, conn: Outbound, stream_id: int, head: RequestHead, end: bool
    ) -> Stream:
        """The hit path of an instance."""
        if method.accept is not None:
            refusal = method.accept(head)
            if refusal is not None:
                return self._refuse(conn, stream_id, head, end, *refusal)
        call = UnaryCall(conn, stream_id, head, self.limits.max_message_bytes, method.handler)
        call.remote_closed = end
        conn.streams[stream_id] = call
        if end:
            call.on_data(b"", True)
        return call

    def _open(
        self,
        method: AsyncUnary | Streaming,
        conn: Outbound,
        stream_id: int,
        head: RequestHead,
        end: bool,
    ) -> Stream:
        if method.accept is not None:
            refusal = method.accept(head)
            if refusal is not None:
                return self._refuse(conn, stream_id, head, end, *refusal)
        limit = self.limits.max_message_bytes
        stream: UnaryCall | StreamCall
        if isinstance(method, AsyncUnary):
            stream = UnaryCall(conn, stream_id, head, limit, self._spawning(method))
        else:
            stream = StreamCall(conn, stream_id, head, limit)
        conn.add(stream, remote_closed=end)
        if isinstance(stream, StreamCall) and isinstance(method, Streaming):
            self._spawn(stream, self._run_stream(stream, method))
        if end:
            stream.on_data(b"", True)
        return stream

    def _not_grpc(self, conn: Outbound, stream_id: int, head: RequestHead, end: bool) -> Stream:
        stream = HttpErrorStream(conn, stream_id)
        conn.add(stream, remote_closed=end)
        stream.answer(405 if head.method != b"POST" else 415)
        return stream

    def _refuse(
        self,
        conn: Outbound,
        stream_id: int,
        head: RequestHead,
        end: bool,
        error: MeshError,
        trailers: Metadata,
    ) -> Stream:
        call = RefusedCall(conn, stream_id, head, 0)
        conn.add(call, remote_closed=end)
        call.fail(error, trailers=trailers)
        return call

    # ------------------------------------------------------------------ tasks

    def _spawning(self, method: AsyncUnary) -> Any:
        def handler(call: ServerCall, message: bytes) -> None:
            self._spawn(call, self._run_unary(call, message, method.handler))

        return handler

    def _spawn(self, call: ServerCall, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        call.on_cancel = task.cancel  # type: ignore[assignment]

    async def _run_unary(self, call: ServerCall, message: bytes, handler: Any) -> None:
        reply: Awaitable[bytes] = handler(call, message)
        try:
            call.reply(await reply)
        except MeshError as error:
            call.fail(error)
        except asyncio.CancelledError:
            call.fail_code(Code.UNAVAILABLE, "the server is shutting down")
        except Exception:
            log.exception("handler of %s failed", call.head.path)
            call.fail(Internal(f"{call.head.path} failed; the server's log has the cause"))

    async def _run_stream(self, call: StreamCall, method: Streaming) -> None:
        try:
            await method.handler(call)
            call.finish()
        except MeshError as error:
            call.fail(error)
        except asyncio.CancelledError:
            call.fail_code(Code.UNAVAILABLE, "the server is shutting down")
        except Exception:
            log.exception("handler of %s failed", call.head.path)
            call.fail(Internal(f"{call.head.path} failed; the server's log has the cause"))


def _unknown(head: RequestHead) -> MeshError:
    return Unimplemented(f"method {head.path!r} is not known here")
