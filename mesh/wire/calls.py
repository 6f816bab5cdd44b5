"""Server-side calls at message level: what a handler holds in its hands.

A call *is* its stream. The unary hit path makes no task, future or queue: the message is cut out of
the one DATA frame that it came in, the handler answers through the call, and headers, message and
trailers leave as one piece of output.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Final

from mesh.core.errors import (
    Code,
    DeadlineExceeded,
    Internal,
    InvalidArgument,
    MeshError,
)
from mesh.wire import frames, messages
from mesh.wire.frames import ErrorCode, pack_header
from mesh.wire.head import RequestHead
from mesh.wire.messages import Metadata
from mesh.wire.outbound import Outbound
from mesh.wire.stream import Buffer, Stream

log = logging.getLogger(__name__)

_OK_HEADERS_SIZE: Final = len(messages.OK_HEADERS)
_OK_TRAILERS_SIZE: Final = len(messages.OK_TRAILERS)

Accept = Callable[[RequestHead], tuple[MeshError, Metadata] | None]


class ServerCall(Stream):
    """One call as a handler sees it.

    ``deadline_s`` is on the clock of ``time.monotonic`` (inf without one). ``cancelled`` turns true
    when the peer reset the stream or went away, or when the deadline passed; ``on_cancel`` is
    called then.
    """

    __slots__ = ("_finished", "_headers_sent", "cancelled", "head", "limit", "on_cancel")

    def __init__(self, conn: Outbound, stream_id: int, head: RequestHead, limit: int) -> None:
        super().__init__(conn, stream_id)
        self.head = head
        self.limit = limit
        self.cancelled = False
        self.on_cancel: Callable[[], None] | None = None
        self._headers_sent = False
        self._finished = False
        if head.timeout_s is not None:
            self.deadline_s = conn.now_s + head.timeout_s

    def reply(self, message: bytes, *, initial: Metadata = (), trailers: Metadata = ()) -> None:
        """The unary answer: headers, message and trailers in one write. No-op when cancelled."""
        if self._finished:
            return
        self._finished = True
        size = len(message) + 5
        conn = self.conn
        if initial or trailers or size > self.send_window or size > conn.send_window:
            self._reply_slowly(message, initial, trailers)
            return
        if size > conn.peer_max_frame or not conn.writable or conn._block_prefix:
            self._reply_slowly(message, initial, trailers)
            return
        self.send_window -= size
        conn.send_window -= size
        stream_id = self.id
        conn.out.append(
            b"".join(
                (
                    pack_header(0, _OK_HEADERS_SIZE, 1, 4, stream_id),
                    messages.OK_HEADERS,
                    pack_header(size >> 8, size & 0xFF, 0, 0, stream_id),
                    b"\0",
                    (size - 5).to_bytes(4, "big"),
                    message,
                    pack_header(0, _OK_TRAILERS_SIZE, 1, 5, stream_id),
                    messages.OK_TRAILERS,
                )
            )
        )
        if not conn.dirty:
            conn.mark_dirty()
        conn.close_local(self)

    def _reply_slowly(self, message: bytes, initial: Metadata, trailers: Metadata) -> None:
        self._send_initial(initial)
        self.send_data(messages.prefix(message), False)
        if message:
            self.send_data(memoryview(message), False)
        block = messages.OK_TRAILERS
        self.send_trailers(block + messages.encode_metadata(trailers) if trailers else block)

    def _send_initial(self, initial: Metadata) -> None:
        self._headers_sent = True
        block = messages.OK_HEADERS
        self.send_headers(block + messages.encode_metadata(initial) if initial else block, False)

    def fail(self, error: MeshError, *, trailers: Metadata = ()) -> None:
        """End with the status of a MeshError (its retry hint as ``grpc-retry-pushback-ms``)."""
        if self._finished:
            return
        self._finished = True
        block = messages.error_trailers(error, trailers)
        if self._headers_sent:
            self.send_trailers(block)
        else:
            self.send_headers(messages.trailers_only(block), True)

    def fail_code(self, code: Code, message: str, *, trailers: Metadata = ()) -> None:
        self.fail(MeshError(message, code=code), trailers=trailers)

    def _cancel(self) -> None:
        self._finished = True
        self.cancelled = True
        callback, self.on_cancel = self.on_cancel, None
        if callback is not None:
            callback()

    def on_reset(self, code: int) -> None:
        if not self.cancelled:
            self._cancel()

    def on_deadline(self) -> None:
        if self._finished:
            if self.queue is not None:  # the answer is there, the client does not read it
                self.reset(ErrorCode.CANCEL)
            self.deadline_s = float("inf")
            return
        self.fail(DeadlineExceeded("the deadline passed before the answer was ready"))
        self._cancel()


@dataclass(frozen=True, slots=True)
class Unary:
    """``handler(call, message)`` answers through ``call``, at once or later.

    ``accept(head)`` runs when the headers are there, before the body: an error (and its trailers)
    refuses the call.
    """

    handler: Callable[[ServerCall, bytes], None]
    accept: Accept | None = None


@dataclass(frozen=True, slots=True)
class AsyncUnary:
    """A coroutine per call: for what is rare. A MeshError that it raises becomes the status."""

    handler: Callable[[ServerCall, bytes], Awaitable[bytes]]
    accept: Accept | None = None


@dataclass(frozen=True, slots=True)
class Streaming:
    """A coroutine per call with messages both ways; returning ends with OK."""

    handler: Callable[[StreamCall], Awaitable[None]]
    accept: Accept | None = None


Method = Unary | AsyncUnary | Streaming


class UnaryCall(ServerCall):
    """A call that takes one message."""

    __slots__ = ("_assembler", "_handler", "_message")

    def __init__(
        self,
        conn: Outbound,
        stream_id: int,
        head: RequestHead,
        limit: int,
        handler: Callable[[ServerCall, bytes], None],
    ) -> None:
        super().__init__(conn, stream_id, head, limit)
        self._handler = handler
        self._assembler: messages.Assembler | None = None
        self._message: bytes | None = None

    def on_data(self, data: Buffer, end: bool) -> None:
        if self._finished:
            self.consume(len(data))
            return
        try:
            if self._assembler is None and end and len(data) >= 5 and data[0] == 0:
                length = int.from_bytes(data[1:5], "big")
                messages.check_size(length, self.limit)
                if length == len(data) - 5:
                    self._handler(self, bytes(data[5:]))
                    return
            self._collect(data, end)
        except MeshError as error:
            self.fail(error)
        except Exception:
            log.exception("handler of %s failed", self.head.path)
            self.fail(Internal(f"{self.head.path} failed; the server's log has the cause"))

    def waits_for_prefix(self) -> bool:
        return not self._finished and not self.remote_closed and self._assembler is None

    def _collect(self, data: Buffer, end: bool) -> None:
        """A message in pieces: the window grows, since the whole message is kept anyway."""
        if self._assembler is None:
            self._assembler = messages.Assembler(self.limit, self.head.encoding)
            if not end:
                self.grow_window(self.conn.limits.accepted_window_bytes)
        whole = self._assembler.feed(data)
        self.consume(len(data))
        if len(whole) > 1 or (whole and self._message is not None):
            raise InvalidArgument(f"{self.head.path} takes one message, got several")
        if whole:
            self._message = whole[0]
        if not end:
            return
        if self._assembler.incomplete or self._message is None:
            raise InvalidArgument(f"{self.head.path}: the request ended before its message did")
        self._handler(self, self._message)


class StreamCall(ServerCall):
    """A call with messages both ways: ``async for message in call``, ``await call.send(...)``.

    A message that arrived counts against the stream's window until the handler takes it.
    """

    __slots__ = ("_assembler", "_ended", "_error", "_inbox", "_pending", "_reader", "_writer")

    def __init__(self, conn: Outbound, stream_id: int, head: RequestHead, limit: int) -> None:
        super().__init__(conn, stream_id, head, limit)
        self._assembler = messages.Assembler(limit, head.encoding)
        self._inbox: deque[bytes] = deque()
        self._pending = 0  # received bytes that the window does not know to be consumed
        self._ended = False
        self._error: MeshError | None = None
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    def on_data(self, data: Buffer, end: bool) -> None:
        if self._finished:
            self.consume(len(data))
            return
        try:
            self._inbox.extend(self._assembler.feed(data))
            if end and self._assembler.incomplete:
                raise InvalidArgument("the request ended inside a message")
        except MeshError as error:
            self._error = error
            self._ended = True
        self._ended |= end
        self._pending += len(data)
        if not self._inbox and self._pending:  # the rest of a large message must come
            self._release()
        self._wake()

    def _release(self) -> None:
        pending, self._pending = self._pending, 0
        self.consume(pending)

    def _wake(self) -> None:
        for waiter in (self._reader, self._writer):
            if waiter is not None and not waiter.done():
                waiter.set_result(None)

    def _cancel(self) -> None:
        super()._cancel()
        self._wake()

    def on_drained(self, sent: int) -> None:
        if self._writer is not None and self.queue is None and not self._writer.done():
            self._writer.set_result(None)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Messages until the client half-closes. Raises MeshError (CANCELLED when it went)."""
        while True:
            if self.cancelled:
                raise MeshError("the client cancelled", code=Code.CANCELLED)
            if self._inbox:
                message = self._inbox.popleft()
                if not self._inbox:
                    self._release()
                yield message
                continue
            if self._error is not None:
                raise self._error
            if self._ended:
                return
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
            self._reader = None

    async def send(self, message: bytes) -> None:
        """Send one message; waits while the peer's window is closed."""
        if self.cancelled or self._finished:
            raise MeshError("the client cancelled", code=Code.CANCELLED)
        if not self._headers_sent:
            self._send_initial(())
        self.send_data(messages.prefix(message) + message, False)
        if self.queue is not None:
            self._writer = asyncio.get_running_loop().create_future()
            await self._writer
            self._writer = None
            if self.cancelled:
                raise MeshError("the client cancelled", code=Code.CANCELLED)

    def finish(self) -> None:
        """End with OK."""
        if self._finished:
            return
        if not self._headers_sent:
            self._send_initial(())
        self._finished = True
        self.send_trailers(messages.OK_TRAILERS)


class RefusedCall(ServerCall):
    """A call that was refused at its headers: takes what still comes, and drops it."""

    __slots__ = ()

    def on_data(self, data: Buffer, end: bool) -> None:
        self.consume(len(data))


class HttpErrorStream(Stream):
    """A request that is no gRPC: answered with an HTTP status."""

    __slots__ = ()

    def answer(self, status: int) -> None:
        from mesh.wire import hpack

        self.send_headers(hpack.encode([(b":status", b"%d" % status)]), True)

    def on_data(self, data: Buffer, end: bool) -> None:
        self.consume(len(data))

    def on_reset(self, code: int) -> None:
        pass


assert frames.DATA == 0 and frames.HEADERS == 1  # ``reply`` writes them as numbers
