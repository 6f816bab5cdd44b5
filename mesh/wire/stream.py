"""One stream of an HTTP/2 connection, and what stands behind a connection.

Streams are objects of the owner's making, so that a relay or a handler *is* the stream: no event
objects, no queue between. See ``mesh.wire.connection``.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Final, Protocol

from mesh.wire import frames
from mesh.wire.frames import ErrorCode, pack_header
from mesh.wire.head import ReplyHead, RequestHead

if TYPE_CHECKING:
    from mesh.wire.outbound import Outbound

Buffer = bytes | memoryview

_NEVER: Final = float("inf")


class Stream:
    """One stream. Owners subclass it and override the ``on_*`` methods.

    ``queue`` holds what the peer's windows did not let through yet, in order: data, and last an
    end marker (trailers, or an empty END_STREAM).
    """

    __slots__ = (
        "conn",
        "credit_step",
        "deadline_s",
        "empty_frames",
        "headers_seen",
        "id",
        "local_closed",
        "progress_s",
        "queue",
        "queued_bytes",
        "recv_credit",
        "recv_window",
        "remote_closed",
        "send_window",
        "started_s",
    )

    def __init__(self, conn: Outbound, stream_id: int) -> None:
        self.conn = conn
        self.id = stream_id
        self.send_window = conn.peer_initial_window
        self.recv_window = conn.stream_window
        self.credit_step = conn.credit_step
        self.recv_credit = 0
        self.remote_closed = False
        self.local_closed = False
        self.queue: deque[Buffer | End] | None = None
        self.queued_bytes = 0
        self.empty_frames = 0
        self.headers_seen = not conn.client  # a reply's headers have come: DATA may follow
        self.deadline_s = _NEVER
        self.started_s = self.progress_s = conn.now_s

    # What the owner overrides.
    def on_data(self, data: Buffer, end: bool) -> None:
        """Part of a DATA frame. ``data`` of a large read is a view: valid as long as it is held."""
        raise NotImplementedError

    def on_data_run(self, pieces: list[Buffer], total: int) -> None:
        """Several DATA frames of one large read, none of them the last: ``total`` bytes."""
        streams = self.conn.streams
        for piece in pieces:
            if streams.get(self.id) is not self:
                return  # reset while it took them
            self.on_data(piece, False)

    def on_reply(self, head: ReplyHead, end: bool) -> None:
        """Client side: initial headers (``end`` False) or trailers (True)."""
        raise NotImplementedError

    def on_trailers(self, head: ReplyHead) -> None:
        """Server side: the request ended with trailers. gRPC has none: they are dropped."""
        self.on_data(b"", True)

    def on_reset(self, code: int) -> None:
        """The peer, or we for a rule that it broke, ended this stream; it is gone already."""
        raise NotImplementedError

    def on_lost(self, reason: str) -> None:
        """The connection is gone."""
        self.on_reset(ErrorCode.CANCEL)

    def on_silent(self) -> None:
        """The peer answers no PING. What can be done elsewhere may leave this stream."""

    def on_drained(self, sent: int) -> None:
        """``sent`` queued bytes have left."""

    def on_granted(self) -> None:
        """The peer has enlarged this stream's window."""

    def on_deadline(self) -> None:
        """``deadline_s`` has passed."""

    def waits_for_prefix(self) -> bool:
        """Nothing can be done until the client has sent the first message's length."""
        return False

    # What the owner calls.
    def consume(self, count: int) -> None:
        """``count`` received bytes were passed on: give the peer that much window again."""
        self.recv_credit += count
        if self.recv_credit >= self.credit_step and not self.remote_closed:
            self.conn.control(frames.window_update(self.id, self.recv_credit))
            self.recv_window += self.recv_credit
            self.recv_credit = 0

    def grow_window(self, size: int) -> None:
        """Let the peer have ``size`` bytes under way on this stream, and tell it less often."""
        self.credit_step = max(self.credit_step, size // 2)
        if not self.remote_closed and size > self.recv_window + self.recv_credit:
            self.conn.control(frames.window_update(self.id, size - self.recv_window))
            self.recv_window = size
            self.recv_credit = 0

    @property
    def wide(self) -> bool:
        return self.credit_step > self.conn.credit_step

    def send_headers(self, block: bytes, end: bool) -> None:
        self.conn.send_headers(self, block, end)

    def send_data(self, data: Buffer, end: bool) -> bool:
        """Send what the windows allow and queue the rest.

        True when all of it left without being queued; else ``on_drained`` tells, now or later, of
        every byte that leaves.
        """
        conn = self.conn
        size = len(data)
        if (
            self.queue is None
            and size <= self.send_window
            and size <= conn.send_window
            and size <= conn.peer_max_frame
            and conn.writable
        ):
            self.send_window -= size
            conn.send_window -= size
            out = conn.out
            out.append(pack_header(size >> 8, size & 0xFF, frames.DATA, 1 if end else 0, self.id))
            if size:
                out.append(data)
            if not conn.dirty:
                conn.mark_dirty()
            if end:
                conn.close_local(self)
            return True
        return conn.enqueue(self, data, end)

    def send_run(self, pieces: list[Buffer], total: int) -> bool:
        """Send several pieces at once, under as few frame headers as the peer takes.

        False, and nothing sent, when that is not possible: then send them one by one.
        """
        conn = self.conn
        if (
            self.queue is not None
            or total > self.send_window
            or total > conn.send_window
            or not conn.writable
        ):
            return False
        largest = conn.peer_max_frame
        out = conn.out
        if total <= largest:
            out.append(pack_header(total >> 8, total & 0xFF, frames.DATA, 0, self.id))
            out.extend(pieces)
        elif max(map(len, pieces)) <= largest:
            for piece in pieces:
                size = len(piece)
                out.append(pack_header(size >> 8, size & 0xFF, frames.DATA, 0, self.id))
                out.append(piece)
        else:
            return False
        self.send_window -= total
        conn.send_window -= total
        if not conn.dirty:
            conn.mark_dirty()
        return True

    def send_trailers(self, block: bytes) -> None:
        """A header block that ends the stream, behind whatever is queued."""
        if self.queue is None:
            self.conn.send_headers(self, block, True)
        else:
            self.queue.append(End(block))

    def reset(self, code: int) -> None:
        """End the stream now, both ways. The owner is not called."""
        self.conn.reset(self, code)


class End:
    """End of a stream behind queued data: trailers, or an END_STREAM of no bytes."""

    __slots__ = ("block",)

    def __init__(self, block: bytes | None) -> None:
        self.block = block


class Owner(Protocol):
    """What stands behind a connection."""

    def new_stream(
        self, conn: Outbound, stream_id: int, head: RequestHead, end: bool
    ) -> Stream | None:
        """Server side: a request has come. None refuses it (REFUSED_STREAM)."""
        ...

    def on_goaway(self, conn: Outbound) -> None:
        """The peer takes no new streams on this connection."""
        ...

    def on_settings(self, conn: Outbound) -> None:
        """The peer's settings are known (its first SETTINGS frame has come, or changed)."""
        ...
