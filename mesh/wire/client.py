"""gRPC client on asyncio for calls of our own making: one peer, unary and streaming calls."""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Final

from mesh.core.errors import Code, MeshError
from mesh.wire import hpack, messages
from mesh.wire.frames import ErrorCode
from mesh.wire.head import Field, ReplyHead, format_timeout
from mesh.wire.limits import INSIDE, Limits
from mesh.wire.messages import Metadata
from mesh.wire.outbound import Outbound
from mesh.wire.peer import NoConnection, Peer, Unconnected
from mesh.wire.stream import Buffer, Stream

_REFUSALS_MAX: Final = 3
_STATIC: Final = hpack.encode([(b":method", b"POST"), (b":scheme", b"http")])
_CONSTANT: Final = hpack.encode([(b"te", b"trailers"), (b"content-type", b"application/grpc")])


class RpcError(MeshError):
    """The peer's status, or a local UNAVAILABLE or DEADLINE_EXCEEDED. ``trailers`` as received."""

    def __init__(self, code: Code, message: str, trailers: tuple[Field, ...] = ()) -> None:
        super().__init__(message, code=code)
        self.trailers = trailers


class NotSent(RpcError):
    """There was no connection: the peer has not seen the call. RESOURCE_EXHAUSTED when too many
    calls are on their way to it."""


class PeerSilent(RpcError):
    """The peer answers no PING (``Peer.watch``); it may have begun with the call."""


class _Refused(RpcError):
    """REFUSED_STREAM, or GOAWAY below the call: the peer has not looked at it."""


@dataclass(frozen=True, slots=True)
class Reply:
    message: bytes
    initial: tuple[Field, ...]
    trailers: tuple[Field, ...]


def _reset_error(code: int) -> RpcError:
    name = ErrorCode(code).name if code in ErrorCode._value2member_map_ else str(code)
    if code == ErrorCode.REFUSED_STREAM:
        return _Refused(Code.UNAVAILABLE, "the peer refused the call before it looked at it")
    if code == ErrorCode.CANCEL:
        return RpcError(Code.CANCELLED, "the peer cancelled the call")
    if code == ErrorCode.ENHANCE_YOUR_CALM:
        return RpcError(Code.RESOURCE_EXHAUSTED, "the peer reset the call: ENHANCE_YOUR_CALM")
    return RpcError(Code.UNAVAILABLE, f"the peer reset the call: {name}")


class _Call(Stream):
    """One call: an inbox of messages, and how it ended."""

    __slots__ = ("_assembler", "_limit", "ended", "error", "inbox", "initial", "pending", "waiters")

    def __init__(self, conn: Outbound, stream_id: int, limit: int) -> None:
        super().__init__(conn, stream_id)
        self._limit = limit
        self._assembler = messages.Assembler(limit, b"identity")
        self.inbox: deque[bytes] = deque()
        self.pending = 0
        self.initial: ReplyHead | None = None
        self.ended: tuple[Field, ...] | None = None
        self.error: RpcError | None = None
        self.waiters: list[asyncio.Future[None]] = []

    def on_reply(self, head: ReplyHead, end: bool) -> None:
        if not end:
            if self.initial is None and not (head.status is not None and head.status < 200):
                self.initial = head
                self._assembler = messages.Assembler(
                    self._limit, head.get(b"grpc-encoding") or b"identity"
                )
            return
        first = self.initial or head
        code = messages.code_of(head.grpc_status, first.status)
        self.ended = head.fields
        if code is not Code.OK:
            text = messages.percent_decode(head.get(b"grpc-message") or b"")
            if not text and head.grpc_status is None:
                text = f"the peer answered with HTTP status {first.status}, not with gRPC"
            self.error = RpcError(code, text, head.fields)
        elif self._assembler.incomplete:
            self.error = RpcError(Code.INTERNAL, "the reply ended inside a message", head.fields)
        if not self.local_closed:  # the peer wants no more of the request
            self.reset(ErrorCode.NO_ERROR)
        self._wake()

    def on_data(self, data: Buffer, end: bool) -> None:
        try:
            self.inbox.extend(self._assembler.feed(data))
        except MeshError as error:
            self._fail(RpcError(error.code, f"reply: {error.message}"))
            self.reset(ErrorCode.CANCEL)
            return
        self.pending += len(data)
        if not self.inbox:
            self.release()
        if end:
            self._fail(RpcError(Code.INTERNAL, "the reply ended without trailers"))
        self._wake()

    def release(self) -> None:
        pending, self.pending = self.pending, 0
        self.consume(pending)

    def _fail(self, error: RpcError) -> None:
        if self.error is None and self.ended is None:
            self.error = error
            self.ended = ()
        self._wake()

    def on_reset(self, code: int) -> None:
        self._fail(_reset_error(code))

    def on_lost(self, reason: str) -> None:
        self._fail(RpcError(Code.UNAVAILABLE, f"connection lost: {reason}"))

    def on_silent(self) -> None:
        if self.initial is None and self.ended is None:
            self.reset(ErrorCode.CANCEL)
            self._fail(PeerSilent(Code.UNAVAILABLE, "the peer has stopped to answer"))

    def on_drained(self, sent: int) -> None:
        self._wake()

    def on_deadline(self) -> None:
        self.deadline_s = float("inf")
        self.reset(ErrorCode.CANCEL)
        self._fail(RpcError(Code.DEADLINE_EXCEEDED, "the deadline passed"))

    def _wake(self) -> None:
        waiters, self.waiters = self.waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    async def wait(self) -> None:
        """Until something has changed."""
        waiter = asyncio.get_running_loop().create_future()
        self.waiters.append(waiter)
        await waiter


class _Told(_Call):
    """A unary call whose end is told by a callback: no task, no future."""

    __slots__ = ("on_end",)

    on_end: Callable[[_Told], None] | None

    def _wake(self) -> None:
        if self.ended is not None and self.on_end is not None:
            on_end, self.on_end = self.on_end, None
            on_end(self)
        elif self.inbox:
            self.release()


class Begun:
    """A unary call under way, as ``Channel.begin`` gives it: it can be called off."""

    __slots__ = ("_call", "_called_off")

    def __init__(self) -> None:
        self._call: _Told | None = None
        self._called_off = False

    def cancel(self) -> None:
        """Nobody wants the answer any more; the callback is not called."""
        self._called_off = True
        call = self._call
        if call is not None and call.on_end is not None:
            call.on_end = None
            call.reset(ErrorCode.CANCEL)


class ClientStream:
    """A call with messages both ways: ``send``, ``half_close``, ``async for``, ``cancel``."""

    def __init__(self, channel: Channel, path: str, metadata: Metadata, timeout_s: float | None):
        self._channel = channel
        self._path = path
        self._metadata = metadata
        self._timeout_s = timeout_s
        self._call: _Call | None = None
        self._opening = asyncio.Lock()  # who sends and who reads may be two tasks

    async def _open(self) -> _Call:
        if self._call is None:
            async with self._opening:
                if self._call is None:
                    self._call = await self._channel.open(
                        self._path, self._metadata, self._timeout_s
                    )
        return self._call

    async def send(self, message: bytes) -> None:
        """Send one message; waits while the peer's window is closed. Raises RpcError."""
        call = await self._open()
        if call.ended is not None:
            raise call.error or RpcError(Code.CANCELLED, "the peer has ended the call")
        call.send_data(messages.prefix(message) + message, False)
        while call.queue is not None and call.ended is None:
            await call.wait()

    async def half_close(self) -> None:
        """No more messages from us."""
        call = await self._open()
        if call.ended is None and not call.local_closed:
            call.send_data(b"", True)

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Messages until the peer ends; a status other than OK is raised as RpcError."""
        call = await self._open()
        while True:
            if call.inbox:
                message = call.inbox.popleft()
                if not call.inbox:
                    call.release()
                yield message
            elif call.ended is not None:
                self._channel.peer.stream_ended(call.conn)
                if call.error is not None:
                    raise call.error
                return
            else:
                await call.wait()

    def cancel(self) -> None:
        if self._call is not None and self._call.ended is None:
            self._call.reset(ErrorCode.CANCEL)
            self._call.on_reset(ErrorCode.CANCEL)


class Channel:
    """Calls to one peer, over connections that are made and re-made as needed."""

    def __init__(
        self, address: str, *, limits: Limits = INSIDE, ssl_context: ssl.SSLContext | None = None
    ) -> None:
        self.peer = Peer(address, limits=limits, ssl_context=ssl_context)
        self._limits = limits
        self._prefixes: dict[str, bytes] = {}

    @property
    def address(self) -> str:
        return self.peer.address

    async def open(self, path: str, metadata: Metadata, timeout_s: float | None) -> _Call:
        """Start a call: its headers are sent. Raises RpcError."""
        deadline_s = float("inf") if timeout_s is None else time.monotonic() + timeout_s
        conn = self.peer.usable()
        while conn is None or not conn.can_open:  # others may have been quicker
            conn = await self._connection(deadline_s)
        limit = self._limits.max_message_bytes
        call = conn.open_stream(lambda c, stream_id: _Call(c, stream_id, limit))
        assert isinstance(call, _Call)
        call.deadline_s = deadline_s
        block = self._prefix(path)
        if timeout_s is not None:
            left_s = max(0.0, deadline_s - time.monotonic())
            block += hpack.encode_literal(b"grpc-timeout", format_timeout(left_s))
        if metadata:
            block += messages.encode_metadata(metadata)
        call.send_headers(block, False)
        return call

    def _prefix(self, path: str) -> bytes:
        prefix = self._prefixes.get(path)
        if prefix is None:
            prefix = (
                _STATIC
                + hpack.encode([(b":path", path.encode()), (b":authority", self.address.encode())])
                + _CONSTANT
            )
            self._prefixes[path] = prefix
        return prefix

    async def _connection(self, deadline_s: float) -> Outbound:
        ready: asyncio.Future[Outbound] = asyncio.get_running_loop().create_future()

        def on_ready(found: Outbound | NoConnection) -> None:
            if ready.done():
                return
            if isinstance(found, NoConnection):
                full = found.why is Unconnected.FULL
                code = Code.RESOURCE_EXHAUSTED if full else Code.UNAVAILABLE
                ready.set_exception(NotSent(code, found.reason))
            else:
                ready.set_result(found)

        self.peer.acquire(on_ready)
        try:
            async with asyncio.timeout(
                None if deadline_s == float("inf") else deadline_s - time.monotonic()
            ):
                return await ready
        except TimeoutError:
            raise RpcError(
                Code.DEADLINE_EXCEEDED, f"no connection to {self.address} before the deadline"
            ) from None

    async def unary(
        self, path: str, message: bytes, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> Reply:
        """One message there, one back. Cancelling the task cancels the call. Raises RpcError.

        A call that the peer refused unseen is sent again.
        """
        deadline_s = None if timeout_s is None else time.monotonic() + timeout_s
        for _ in range(_REFUSALS_MAX):
            try:
                return await self._unary(path, message, metadata, timeout_s)
            except _Refused:
                if deadline_s is not None:
                    timeout_s = max(0.0, deadline_s - time.monotonic())
        return await self._unary(path, message, metadata, timeout_s)

    async def _unary(
        self, path: str, message: bytes, metadata: Metadata, timeout_s: float | None
    ) -> Reply:
        call = await self.open(path, metadata, timeout_s)
        try:
            call.send_data(messages.prefix(message) + message, True)
            while call.ended is None:
                await call.wait()
                if call.inbox:
                    call.release()
        except asyncio.CancelledError:
            call.reset(ErrorCode.CANCEL)
            raise
        finally:
            self.peer.stream_ended(call.conn)
        if call.error is not None:
            raise call.error
        if len(call.inbox) != 1:
            raise RpcError(Code.INTERNAL, f"{path} answered with {len(call.inbox)} messages")
        return Reply(call.inbox[0], call.initial.fields if call.initial else (), call.ended)

    def begin(
        self,
        path: str,
        message: bytes,
        block: bytes,
        deadline_s: float,
        on_end: Callable[[Reply | RpcError], None],
    ) -> Begun:
        """``unary`` without a task, for the hit path: ``on_end`` is called once, never from here.

        ``block`` are the encoded fields of the metadata; ``deadline_s`` is on the clock of
        ``time.monotonic`` (inf: none). A call that the peer refused unseen is not sent again.
        """
        begun = Begun()

        def ended(call: _Told) -> None:
            self.peer.stream_ended(call.conn)
            if call.error is not None:
                on_end(call.error)
            elif len(call.inbox) != 1:
                text = f"{path} answered with {len(call.inbox)} messages"
                on_end(RpcError(Code.INTERNAL, text))
            else:
                initial = call.initial.fields if call.initial else ()
                on_end(Reply(call.inbox[0], initial, call.ended or ()))

        def connected(found: Outbound | NoConnection) -> None:
            if begun._called_off:
                return
            if isinstance(found, NoConnection):
                full = found.why is Unconnected.FULL
                code = Code.RESOURCE_EXHAUSTED if full else Code.UNAVAILABLE
                error = NotSent(code, found.reason)
                asyncio.get_running_loop().call_soon(on_end, error)
                return
            limit = self._limits.max_message_bytes
            call = found.open_stream(lambda c, stream_id: _Told(c, stream_id, limit))
            assert isinstance(call, _Told)
            call.on_end = ended
            begun._call = call
            call.deadline_s = deadline_s
            head = self._prefix(path) + block
            if deadline_s != float("inf"):
                left_s = max(0.0, deadline_s - time.monotonic())
                head += hpack.encode_literal(b"grpc-timeout", format_timeout(left_s))
            call.send_headers(head, False)
            call.send_data(messages.prefix(message) + message, True)

        conn = self.peer.usable()
        if conn is not None:
            connected(conn)
        else:
            self.peer.acquire(connected)
        return begun

    def stream(
        self, path: str, *, metadata: Metadata = (), timeout_s: float | None = None
    ) -> ClientStream:
        return ClientStream(self, path, metadata, timeout_s)

    async def close(self) -> None:
        self.peer.abort()
        await asyncio.sleep(0)
