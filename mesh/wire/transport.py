"""The asyncio shell of a connection: reads, batched writes, time.

One ``Pump`` serves all connections of an event loop. It owns the read buffers, the list of
connections with output (written once per turn of the loop, so that the replies of a whole batch
leave in one write) and one coarse timer that checks deadlines and time-outs: no timer per call.

Reads go into shared buffers. A small read becomes ``bytes`` and its buffer is free at once; of a
large one views are passed on, and the buffer is used again only when nobody holds a view of it.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import ssl
import time
from collections.abc import Callable
from typing import Any, Final, cast
from weakref import WeakKeyDictionary

from mesh.wire.connection import Connection
from mesh.wire.frames import ErrorCode
from mesh.wire.outbound import Outbound
from mesh.wire.stream import Buffer

log = logging.getLogger(__name__)

_READ_BYTES: Final = 256 * 1024
_SMALL_READ_BYTES: Final = 16 * 1024
_BUFFERS_MAX: Final = 16
_WRITE_HIGH_BYTES: Final = 64 * 1024
_JOIN_BYTES: Final = 64 * 1024
# A read that comes sooner after the last one was in the same batch of ready connections.
_LONE_READ_S: Final = 20e-6
_TICK_S: Final = 0.05
_SLOW_TICKS: Final = 20  # time-outs of seconds are looked at once a second
_LAST_WORDS_S: Final = 5.0  # a peer that has not read our last words by then is cut off


class Pump:
    """Batches the writes and keeps the time of all connections of one event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.dirty: list[Link] = []
        self.links: set[Link] = set()
        self._scheduled = False
        self.reading = False  # inside a read: its end flushes, in this same turn of the loop
        self._buffers: list[bytearray] = [bytearray(_READ_BYTES)]
        self._timer: asyncio.TimerHandle | None = None
        self._ticks = 0
        # Told at every tick what all peers together have not let us send yet, in bytes.
        self.on_tick: Callable[[int], None] | None = None
        self.counting_bytes = 0
        self.read_ended_s = 0.0

    def mark(self, link: Link) -> None:
        self.dirty.append(link)
        if not self.reading and not self._scheduled:
            self._scheduled = True
            self.loop.call_soon(self.flush)

    def flush(self) -> None:
        """Write what every connection has queued."""
        self._scheduled = False
        self.reading = False
        dirty, self.dirty = self.dirty, []
        for link in dirty:
            try:
                link.flush()
            except Exception:  # one connection's trouble must not keep the others' output
                log.exception("writing to a connection failed")
                link.abort()

    def buffer(self) -> bytearray:
        """A read buffer that nobody holds a view of."""
        buffers = self._buffers
        for index in range(len(buffers) - 1, -1, -1):
            candidate = buffers[index]
            try:
                candidate.append(0)  # refused while a view is exported
                candidate.pop()
            except BufferError:
                continue
            return candidate
        fresh = bytearray(_READ_BYTES)
        if len(buffers) < _BUFFERS_MAX:
            buffers.append(fresh)
        return fresh

    def add(self, link: Link) -> None:
        self.links.add(link)
        if self._timer is None:
            self._timer = self.loop.call_later(_TICK_S, self._tick)

    def remove(self, link: Link) -> None:
        self.links.discard(link)

    def _tick(self) -> None:
        self._timer = None
        if not self.links:
            if self.on_tick is not None:
                self.on_tick(0)
            return
        now_s = time.monotonic()
        self._ticks += 1
        slow = self._ticks % _SLOW_TICKS == 0
        self.counting_bytes = 0
        for link in list(self.links):
            try:
                link.check(now_s, slow=slow)
            except Exception:  # the clock of all connections goes on
                log.exception("a deadline or time-out could not be handled")
                link.abort()
        if self.on_tick is not None:
            self.on_tick(self.counting_bytes)
        self._timer = self.loop.call_later(_TICK_S, self._tick)


_pumps: WeakKeyDictionary[asyncio.AbstractEventLoop, Pump] = WeakKeyDictionary()


def pump_of(loop: asyncio.AbstractEventLoop) -> Pump:
    """The loop's one pump."""
    pump = _pumps.get(loop)
    if pump is None:
        pump = _pumps[loop] = Pump(loop)
    return pump


class Link(asyncio.BufferedProtocol):
    """One connection and its transport. ``on_up`` and ``on_down`` tell the owner."""

    def __init__(
        self,
        pump: Pump,
        make: Callable[[float], Connection],
        *,
        on_up: Callable[[Link], None] | None = None,
        on_down: Callable[[Link, str], None] | None = None,
        on_read: Callable[[], None] | None = None,
    ) -> None:
        self.pump = pump
        self._make = make
        self._on_up = on_up
        self._on_down = on_down
        self._on_read = on_read
        self.transport: asyncio.Transport | None = None
        self.conn: Connection = make(time.monotonic())
        self._buffer: bytearray = pump._buffers[0]
        self._closing_since_s = 0.0
        self._tls = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self._tls = transport.get_extra_info("sslcontext") is not None
        self.transport.set_write_buffer_limits(high=_WRITE_HIGH_BYTES)
        sock = transport.get_extra_info("socket")
        if sock is not None and sock.family in (socket.AF_INET, socket.AF_INET6):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.conn.on_dirty = self._mark
        self.pump.add(self)
        if self.conn.out:
            self.conn.dirty = True
            self.pump.mark(self)
        if self._on_up is not None:
            self._on_up(self)

    def _mark(self, _conn: Outbound) -> None:
        self.pump.mark(self)

    def get_buffer(self, _sizehint: int) -> bytearray | memoryview:
        self._buffer = self.pump.buffer()
        if self._tls:
            # asyncio's TLS reads record after record into slices of what it is given here, and a
            # slice of a bytearray is a copy: all but the first record would be lost.
            return memoryview(self._buffer)
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        data: Buffer
        small = count <= _SMALL_READ_BYTES
        if small:
            data = bytes(memoryview(self._buffer)[:count])
        else:
            data = memoryview(self._buffer)[:count]
        pump = self.pump
        # What a lone small read causes is written at once. When reads come one behind the other,
        # or are large, it is written once a turn of the loop: fewer and larger writes.
        now_s = time.monotonic()
        at_once = small and now_s - pump.read_ended_s > _LONE_READ_S
        pump.reading = at_once
        try:
            self.conn.receive(data, now_s)
        except Exception:  # a fault of ours costs this connection, no other
            log.exception("a read could not be handled")
            self.conn.terminate(ErrorCode.INTERNAL_ERROR, "internal error")
        if at_once:
            pump.flush()
        pump.read_ended_s = time.monotonic()
        if self.conn.closed:
            self._finish()

    def eof_received(self) -> bool:
        return False  # close the transport: gRPC knows no half-closed connection

    def connection_lost(self, error: Exception | None) -> None:
        self.pump.remove(self)
        self.transport = None
        reason = str(error) if error else "connection closed by peer"
        if self.conn.error is not None:
            reason = self.conn.error.message
        self.conn.connection_lost(reason)
        if self._on_down is not None:
            self._on_down(self, reason)

    def pause_writing(self) -> None:
        self.conn.writable = False

    def resume_writing(self) -> None:
        self.conn.writable = True
        self.conn.resume()

    def flush(self) -> None:
        conn, transport = self.conn, self.transport
        out = conn.take_output()
        if transport is None or transport.is_closing():
            return
        if len(out) == 1:
            transport.write(out[0])
        elif sum(map(len, out)) <= _JOIN_BYTES:
            transport.write(b"".join(out))
        else:
            transport.writelines(out)
        if conn.closed:
            transport.close()

    def check(self, now_s: float, *, slow: bool) -> None:
        """Deadlines of streams; once a second also the connection's own time-outs."""
        conn = self.conn
        conn.now_s = now_s
        late = []
        for stream in conn.streams.values():
            if stream.deadline_s <= now_s:
                late.append(stream)
            if stream.queue is not None:
                self.pump.counting_bytes += stream.queued_bytes
        for stream in late:
            stream.on_deadline()
        if conn._blocked:
            conn.settle(now_s - _TICK_S)
        if not slow:
            return
        if not conn.closed:
            self._time_outs(now_s)
        elif self._closing_since_s == 0.0:
            self._closing_since_s = now_s
        elif now_s - self._closing_since_s > _LAST_WORDS_S:
            self.abort()

    def _time_outs(self, now_s: float) -> None:
        conn, limits = self.conn, self.conn.limits
        if not conn.preface_done:
            if now_s - conn.started_s > limits.preface_timeout_s:
                conn.terminate(ErrorCode.SETTINGS_TIMEOUT, "no preface and SETTINGS in time")
        elif not conn.streams and now_s - conn.last_read_s > limits.idle_timeout_s:
            conn.terminate(ErrorCode.NO_ERROR, "idle")
        elif conn.header_block_since_s and (
            now_s - conn.header_block_since_s > limits.headers_timeout_s
        ):
            conn.terminate(ErrorCode.PROTOCOL_ERROR, "a header block was not completed in time")
        else:
            stuck = [
                s
                for s in conn.streams.values()
                if s.queue is not None and now_s - s.progress_s > limits.progress_timeout_s
            ]
            silent = [
                s
                for s in conn.streams.values()
                if now_s - s.started_s > limits.prefix_timeout_s and s.waits_for_prefix()
            ]
            for stream in stuck + silent:
                stream.reset(ErrorCode.CANCEL)
                stream.on_reset(ErrorCode.CANCEL)
            if not conn.writable and stuck:
                self.abort()
        if conn.closed:
            self._finish()

    def _finish(self) -> None:
        """The protocol is over: write what is queued (the GOAWAY), then close."""
        if self.transport is not None and not self.transport.is_closing():
            self.flush()
            if self.transport is not None:
                self.transport.close()

    def close(self) -> None:
        """GOAWAY and close."""
        self.conn.terminate(ErrorCode.NO_ERROR, "closing")
        self._finish()

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


async def connect(
    pump: Pump,
    address: str,
    make: Callable[[float], Connection],
    *,
    ssl_context: ssl.SSLContext | None = None,
    **callbacks: Any,
) -> Link:
    """Open a client connection to ``host:port`` or ``unix:/path``. Raises OSError."""

    def factory() -> Link:
        return Link(pump, make, **callbacks)

    loop = pump.loop
    if address.startswith("unix:"):
        _, link = await loop.create_unix_connection(factory, address[5:], ssl=ssl_context)
    else:
        host, _, port = address.rpartition(":")
        _, link = await loop.create_connection(
            factory, host.strip("[]"), int(port), ssl=ssl_context
        )
    return link
